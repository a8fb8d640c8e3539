//! A directory of files as the kubelet mounts a ConfigMap: each is a link into a directory
//! that is swapped, by one rename, for another with all of the new files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::TempDir;

/// A mounted ConfigMap.
#[derive(Debug)]
pub struct ConfigMap {
    directory: TempDir,
    version: u32,
}

impl ConfigMap {
    /// Mounts these files: name and content.
    ///
    /// # Errors
    /// No room for them.
    pub fn mount(files: &[(&str, &str)]) -> Result<Self> {
        let mut map = Self { directory: TempDir::new()?, version: 0 };
        map.update(files)?;
        for (name, _) in files {
            symlink(Path::new("..data").join(name), map.path(name))?;
        }
        Ok(map)
    }

    /// Where a file is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Changes the files, all at once.
    ///
    /// # Errors
    /// No room for them.
    pub fn update(&mut self, files: &[(&str, &str)]) -> Result<()> {
        let old = format!("..{}", self.version);
        self.version += 1;
        let new = format!("..{}", self.version);
        fs::create_dir(self.path(&new))?;
        for (name, content) in files {
            fs::write(self.path(&new).join(name), content)?;
        }
        symlink(&new, self.path("..data_tmp"))?;
        fs::rename(self.path("..data_tmp"), self.path("..data"))?;
        if self.version > 1 {
            fs::remove_dir_all(self.path(&old))?;
        }
        Ok(())
    }
}
