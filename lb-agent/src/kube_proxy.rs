//! The configuration of kube-proxy (`kubeproxy.config.k8s.io/v1alpha1`): its file, its flags and
//! its defaults.
//!
//! [`crate::config`] defines the meaning of each field for lb. Invariant: a value
//! that its field cannot have is an error that names the path; a field that kube-proxy does not
//! have is kept by its path alone, to be named in the log.

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

/// The only supported version of the file.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// The kind of the file.
pub const KIND: &str = "KubeProxyConfiguration";
/// The key of the configuration in the answer of `/configz`.
const GROUP: &str = "kubeproxy.config.k8s.io";

/// Why the configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read --config {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The file is invalid.
    #[error("--config {}: {fault}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The invalid field.
        fault: FieldError,
    },
    /// The flags do not fit each other or the file.
    #[error("the flags make an invalid configuration: {0}")]
    Flags(FieldError),
    /// The file cannot be written.
    #[error("cannot write --write-config-to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

impl KubeProxyConfiguration {
    /// Merges `flags`, `-v` and the file, if there is one: flags override the file, and the file
    /// overrides the defaults.
    ///
    /// # Errors
    /// If the file cannot be read, or a field or a flag is invalid.
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
        all.unknown = from_file.unknown;
        all.logging.verbosity = verbosity.unwrap_or(all.logging.verbosity);
        all.validate().map_err(Error::Flags)?;
        Ok(all.completed())
    }

    /// Parses a file, YAML or JSON, and fills in the defaults.
    ///
    /// # Errors
    /// If the text is not a configuration; the error has the path of the invalid field.
    pub fn parse(text: &str) -> Result<Self, FieldError> {
        let all = decode::text(text)?.with_defaults();
        all.validate()?;
        Ok(all)
    }

    /// The configuration as a file.
    ///
    /// # Panics
    /// Never: every key is a string.
    pub fn to_yaml(&self) -> String {
        let options = serde_saphyr::ser_options! { compact_list_indent: true };
        let text = serde_saphyr::to_string_with_options(&self.to_json(), options);
        let text = text.expect("a tree of strings and numbers");
        format!("{}\n", text.trim_end())
    }

    /// The answer of `/configz`.
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
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        fs::write(path, self.to_yaml())
            .map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// The paths of the fields in the file that kube-proxy does not have.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
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
