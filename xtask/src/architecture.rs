//! The architectures of images, by the names that `docker buildx --platform` has for them.

use anyhow::{Result, ensure};

/// An architecture that the agent is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Architecture {
    Amd64,
    Arm64,
}

impl Architecture {
    /// That of this machine.
    pub(crate) const HOST: Self =
        if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::Amd64 };

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The variant, as an image names it.
    pub(crate) fn variant(self) -> Option<&'static str> {
        match self {
            Self::Amd64 => None,
            Self::Arm64 => Some("v8"),
        }
    }

    /// The directory of Debian's libraries, which is also the prefix of cross tools.
    pub(crate) fn triplet(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// The target of rustc.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Fails if this machine cannot build for the architecture.
    pub(crate) fn ensure_buildable(self) -> Result<()> {
        ensure!(
            self == Self::HOST || self == Self::Arm64,
            "only an {} machine builds for {}: cross-building is only for arm64",
            self.name(),
            self.name()
        );
        Ok(())
    }
}
