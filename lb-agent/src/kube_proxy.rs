//! The configuration of kube-proxy (`kubeproxy.config.k8s.io/v1alpha1`): what its file
//! holds, what its flags set, and what holds where neither says anything.
//!
//! What a field means here is told by [`crate::config`]. Invariant: a field that kube-proxy
//! does not have, or a value that it could not have, is an error that names its path.

mod decode;
mod defaults;
mod effects;
pub mod flags;
mod types;
mod validate;
pub mod values;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use flags::KubeProxyFlags;

pub use decode::FieldError;
use effects::Effect;
pub use effects::FIELDS;
pub use types::{Conntrack, KubeProxyConfiguration};

/// The only version of the file there is.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// The kind of the file.
pub const KIND: &str = "KubeProxyConfiguration";
/// The name under which `/configz` shows it.
const GROUP: &str = "kubeproxy.config.k8s.io";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read --config {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file is wrong.
    #[error("--config {}: {fault}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: FieldError,
    },
    /// Flags do not fit each other, or the file.
    #[error("the flags make a configuration that is not valid: {0}")]
    Flags(FieldError),
    /// The file cannot be written.
    #[error("cannot write --write-config-to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

impl KubeProxyConfiguration {
    /// The configuration that `flags`, `-v` and the file, if there is one, make: flags win
    /// over the file, the file over the defaults.
    ///
    /// # Errors
    /// If the file cannot be read, or something in it or in the flags is wrong.
    pub fn load(
        file: Option<&Path>,
        flags: &KubeProxyFlags,
        verbosity: Option<u32>,
    ) -> Result<Self, Error> {
        let from_file = match file {
            None => Self::default().with_defaults(),
            Some(path) => {
                let text = fs::read_to_string(path)
                    .map_err(|source| Error::Read { path: path.to_owned(), source })?;
                Self::parse(&text).map_err(|fault| Error::File { path: path.to_owned(), fault })?
            }
        };
        let mut all = flags.over(&from_file).map_err(Error::Flags)?;
        all.logging.verbosity = verbosity.unwrap_or(all.logging.verbosity);
        all.validate().map_err(Error::Flags)?;
        Ok(all.completed())
    }

    /// The configuration of a file, YAML or JSON, with the defaults filled in.
    ///
    /// # Errors
    /// If the text is no such configuration, with the path of the field that is wrong.
    pub fn parse(text: &str) -> Result<Self, FieldError> {
        let all = decode::text(text)?.with_defaults();
        all.validate()?;
        Ok(all)
    }

    /// The file that says all of this.
    ///
    /// # Panics
    /// Never: every key is a string.
    pub fn to_yaml(&self) -> String {
        let options = serde_saphyr::ser_options! { compact_list_indent: true };
        let text = serde_saphyr::to_string_with_options(&self.to_json(), options);
        let text = text.expect("a tree of strings and numbers");
        format!("{}\n", text.trim_end())
    }

    /// What `/configz` answers.
    ///
    /// # Panics
    /// Never: every key is a string.
    pub fn to_configz(&self) -> String {
        let text = serde_json::to_string(self).expect("every key is a string");
        format!("{{\"{GROUP}\":{text}}}")
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        fs::write(path, self.to_yaml())
            .map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// The fields that lb ignores and that the file sets to something other than the default.
    /// A field that one of `flags` sets is left out.
    pub fn without_effect(&self, flags: &KubeProxyFlags) -> Vec<&'static str> {
        let defaults = Self::default().with_defaults();
        let defaults = [defaults.to_json(), defaults.completed().to_json()];
        let own = self.to_json();
        let is_default = |path: &&str| {
            let value = at(&own, path);
            // The periods of modes that are not in use are zero.
            defaults.iter().any(|default| at(default, path) == value)
                || value.and_then(Value::as_str) == Some("0s")
        };
        let ignored = FIELDS.iter().filter(|(_, effect)| *effect == Effect::Ignored);
        let differing = ignored.map(|(path, _)| *path).filter(|path| !is_default(path));
        differing.filter(|path| !flags.sets(path)).collect()
    }

    fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("every key is a string")
    }
}

fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, name| value.get(name))
}

#[cfg(test)]
mod tests;
