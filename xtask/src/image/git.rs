//! The commit that an image is made from.

use crate::run;
use crate::workspace::Workspace;

/// A commit, as the image's labels name it.
pub(super) struct Commit {
    /// Its hash, with `-dirty` if the clone has changes that are not committed.
    pub(super) revision: String,
    /// Whether the clone has such changes.
    pub(super) is_dirty: bool,
    /// When it was committed, as RFC 3339 has it, in UTC.
    pub(super) time: String,
}

/// The commit of the clone; none where the source is no clone.
pub(super) fn commit(workspace: &Workspace) -> Option<Commit> {
    let git = |args: &[&str]| run::answer(workspace.command("git").env("TZ", "UTC0").args(args));
    let hash = git(&["rev-parse", "HEAD"])?;
    let time = git(&["log", "-1", "--format=%cd", "--date=format-local:%Y-%m-%dT%H:%M:%SZ"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    let is_dirty = !changed.is_empty();
    let revision = if is_dirty { format!("{hash}-dirty") } else { hash };
    Some(Commit { revision, is_dirty, time })
}
