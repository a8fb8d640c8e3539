//! Whether the image depends on the clone that it is built in: a second one, elsewhere and without
//! anything that was built before, must make the same bytes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{git, oci};
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

/// The path of the second clone below a temporary directory. It is longer than most paths, because
/// a difference in length shows where a path is part of what was built.
const CLONE: &str = "a-clone-of-the-same-commit/whose-path-is-longer/lb";

/// Builds the image again in a new clone by `make`, and compares it with `image`.
pub(super) fn in_another_clone(
    workspace: &Workspace,
    image: &Path,
    make: impl FnOnce(&Workspace, &Path) -> Result<()>,
) -> Result<()> {
    let commit = git::commit(workspace)
        .with_context(|| format!("{} is no git clone", workspace.root().display()))?;
    ensure!(
        !commit.is_dirty,
        "{} has changes that are not committed, which another clone would not have: commit them",
        workspace.root().display()
    );
    let directory = tempfile::tempdir().context("cannot create a temporary directory")?;
    let root = directory.path().join(CLONE);
    let mut clone = workspace.command("git");
    clone.args(["clone", "--quiet", "--no-checkout"]).arg(workspace.root()).arg(&root);
    run::shown(&mut clone)?;
    let mut checkout = workspace.command("git");
    checkout.arg("-C").arg(&root);
    run::shown(checkout.args(["checkout", "--quiet", "--detach", &commit.revision]))?;

    let progress = Progress::start(format!("building the image in {}", root.display()));
    let second = directory.path().join("image.tar");
    make(&workspace.at(root), &second)?;
    progress.done();
    compare(image, &second)
}

/// Fails if the second image has other bytes; it is then kept beside the first.
fn compare(first: &Path, second: &Path) -> Result<()> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let bytes = read(second)?;
    if read(first)? == bytes {
        println!("both clones made sha256:{}", oci::sha256(&bytes).digest());
        return Ok(());
    }
    let kept = first.with_extension("other-clone.tar");
    fs::copy(second, &kept).with_context(|| format!("cannot write {}", kept.display()))?;
    anyhow::bail!(
        "the image depends on where it is built: compare {} with {}",
        first.display(),
        kept.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_image_is_an_error_and_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for (name, bytes) in [("image.tar", "1"), ("same.tar", "1"), ("different.tar", "2")] {
            fs::write(path(name), bytes).expect("a file");
        }
        compare(&path("image.tar"), &path("same.tar")).expect("the same bytes");
        let error = compare(&path("image.tar"), &path("different.tar"));
        let text = error.map_or_else(|error| error.to_string(), |()| "no error".to_owned());
        assert!(text.starts_with("the image depends on where it is built"), "{text}");
        assert_eq!(fs::read(path("image.other-clone.tar")).expect("the other image"), *b"2");
    }
}
