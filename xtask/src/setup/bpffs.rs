//! The bpffs that maps, programs and links are pinned in.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::run;
use crate::workspace::{Workspace, is_root};

const MOUNT_POINT: &str = "/sys/fs/bpf";

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mount table")?;
    if is_mounted(&mounts) {
        return Ok(false);
    }
    ensure!(
        is_root(),
        "no bpffs is mounted on {MOUNT_POINT}: run `sudo mount -t bpf bpf {MOUNT_POINT}`"
    );
    run::logged(
        workspace.command("mount").args(["-t", "bpf", "bpf", MOUNT_POINT]),
        &workspace.log("mount-bpffs"),
    )
    .with_context(|| format!("cannot mount a bpffs on {MOUNT_POINT}"))?;
    eprintln!("mounted a bpffs on {MOUNT_POINT}");
    Ok(true)
}

/// The last mount on a directory hides the earlier ones.
fn is_mounted(mounts: &str) -> bool {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .rfind(|(directory, _)| *directory == MOUNT_POINT)
        .is_some_and(|(_, kind)| kind == "bpf")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_on_the_directory_counts() {
        let rows = [
            ("sysfs /sys sysfs rw 0 0\n", false),
            ("sysfs /sys sysfs rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n", true),
            ("none /sys/fs/bpf bpf rw 0 0\n", true),
            ("bpf /run/bpf bpf rw 0 0\n", false),
            ("bpf /sys/fs/bpf bpf rw 0 0\nx /sys/fs/bpf tmpfs rw 0 0\n", false),
        ];
        for (mounts, expected) in rows {
            assert_eq!(is_mounted(mounts), expected, "{mounts}");
        }
    }
}
