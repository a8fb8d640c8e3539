//! Why a list or a watch ended.

use std::time::Duration;

use super::{pause::Pause, servers};

/// Why a list or a watch ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The receiver of events is gone.
    #[error("the receiver is gone")]
    Closed,
    /// No server took the request.
    #[error("{}", servers::reason(.0))]
    Request(kube::Error),
    /// A server answered with an error.
    #[error("{code} {message}")]
    Status {
        /// The status code; 0 if the server gave none.
        code: u16,
        /// What the server says.
        message: String,
        /// How long the server asks to be left alone.
        retry_after: Option<Duration>,
        /// It came after a good answer.
        is_in_stream: bool,
    },
    /// The connection broke within an answer.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// Nothing came.
    #[error("the API server sent nothing for {0:?}")]
    Silence(Duration),
    /// The answer ended within a list.
    #[error("the API server ended the list before it was complete")]
    CutShort,
    /// The list is older than what the agent has seen.
    #[error("the list has version {found} and is older than version {known}, which the agent has")]
    Older {
        /// The version of the list.
        found: String,
        /// The version that was seen.
        known: String,
    },
    /// The answer is not what an API server sends.
    #[error("the answer cannot be read: {0}")]
    Malformed(String),
}

/// The longest time that a server may ask to be left alone.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

impl Failure {
    /// The code of the status, if a server answered with one.
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Status { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether the server does not know the version that was asked for: it lags behind, or its
    /// store was restored.
    pub(super) fn is_version_too_large(&self) -> bool {
        matches!(self, Self::Status { code: 504, message, .. }
            if message.contains("Too large resource version"))
    }

    pub(super) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Request(kube::Error::Service(_) | kube::Error::HyperError(_)))
    }

    /// The longest pause before the next attempt.
    pub(super) fn longest_pause(&self) -> Duration {
        match self {
            Self::Status { code: 410, .. } => Pause::OUTDATED,
            failure if failure.is_unreachable() => Pause::UNREACHABLE,
            _ => Pause::LONGEST,
        }
    }

    /// How long the server asks to be left alone.
    pub(super) fn retry_after(&self) -> Duration {
        match self {
            Self::Status { retry_after: Some(delay), .. } => (*delay).min(LONGEST_RETRY_AFTER),
            _ => Duration::ZERO,
        }
    }
}
