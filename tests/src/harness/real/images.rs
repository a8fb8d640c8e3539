//! Archives of images that the nodes' containerd gets before kubelet starts: there is no registry.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The image of pods' first containers, of the release that
/// [`crate::harness::controlplane::programs::KUBERNETES_VERSION`] names.
pub(super) const PAUSE: &str = "registry.k8s.io/pause:3.10.2";

/// Where images of this clone are.
const OWN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/image");
/// The agent's, and that of the tests' servers.
const AGENT: &str = "lb-agent.tar";
const ECHO_ARCHIVE: &str = "lb-echo.tar";

/// The image of `lb-echo`.
pub const ECHO: &str = "localhost/lb-echo:tests";

/// Names the directories of the cache that have the images of this version; `cargo xtask setup`
/// writes it.
const DIRECTORIES: &str = "directories";

/// All archives: those of the cache and those of this clone.
pub(super) fn archives() -> Result<Vec<PathBuf>> {
    let list = Path::new(OWN).join(DIRECTORIES);
    let list = fs::read_to_string(&list)
        .with_context(|| format!("cannot read {}: run `cargo xtask setup`", list.display()))?;
    let mut archives = of_directories(&list)?;
    for name in [AGENT, ECHO_ARCHIVE] {
        let archive = Path::new(OWN).join(name);
        ensure!(
            archive.is_file(),
            "there is no {}: `cargo xtask cluster up` makes it",
            archive.display()
        );
        archives.push(archive);
    }
    Ok(archives)
}

/// The archives in these directories, a line for each.
fn of_directories(list: &str) -> Result<Vec<PathBuf>> {
    let mut archives = Vec::new();
    for directory in list.lines() {
        let files = entries(Path::new(directory))?.into_iter();
        archives.extend(files.filter(|file| file.extension().is_some_and(|it| it == "tar")));
    }
    ensure!(!archives.is_empty(), "no archive of images in {list:?}: run `cargo xtask setup`");
    Ok(archives)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_other_versions_in_the_cache_are_left_there() {
        let cache = tempfile::tempdir().expect("a directory");
        for (directory, file) in
            [("images-1", "old.tar"), ("images-2", "new.tar"), ("images-2", "notes.txt")]
        {
            let directory = cache.path().join(directory);
            fs::create_dir_all(&directory).expect("a directory");
            fs::write(directory.join(file), "").expect("a file");
        }
        let wanted = cache.path().join("images-2");
        let found = of_directories(&format!("{}\n", wanted.display())).expect("archives");
        assert_eq!(found, [wanted.join("new.tar")]);
        assert!(of_directories("").is_err());
    }
}
