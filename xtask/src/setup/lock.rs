//! The lock of the cache: one setup fills it, and others wait.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Locks a file until the result is dropped. If another process holds it, says once which, and
/// waits.
pub(super) fn take(path: &Path) -> Result<File> {
    let lock = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let locked = match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            eprintln!(
                "waiting for {}, which holds {}: another setup is running",
                holder(&lock),
                path.display()
            );
            lock.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    };
    locked.with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(lock)
}

/// The process that holds the lock, with its command line.
fn holder(lock: &File) -> String {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let Some(process) = lock.metadata().ok().and_then(|file| process(&locks, file.ino())) else {
        return "another process".to_owned();
    };
    let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    match command.trim() {
        "" => format!("process {process}"),
        command => format!("process {process} ({command})"),
    }
}

/// The process that holds the lock of a file, by `/proc/locks` (proc(5)): not one that waits for
/// it, whose line has an arrow.
fn process(locks: &str, inode: u64) -> Option<u32> {
    let inode = inode.to_string();
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let process = fields.nth(2)?.parse().ok()?;
        let file = fields.next()?.rsplit(':').next()?;
        (is_flock && file == inode).then_some(process)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn who_waits_knows_for_whom() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("setup.lock");
        let first = take(&path).expect("a lock");
        let (told, waits) = mpsc::channel();
        let other = path.clone();
        let waiting = thread::spawn(move || {
            let second = File::create(&other).expect("the file");
            told.send(holder(&second)).expect("the test waits");
            take(&other).expect("a lock when the first is gone");
            told.send("locked".to_owned()).expect("the test waits");
        });
        let holder = waits.recv().expect("a holder");
        assert!(holder.starts_with(&format!("process {} (", std::process::id())), "{holder}");
        assert!(waits.try_recv().is_err(), "two have the lock");
        drop(first);
        assert_eq!(waits.recv().expect("it got the lock"), "locked");
        waiting.join().expect("no panic");
    }

    #[test]
    fn a_line_of_a_waiter_or_of_another_file_is_not_the_holder_s() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1a:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 12 00:1a:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 00:1a:78 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 14 00:1a:77 0 EOF\n";
        assert_eq!(process(locks, 77), Some(14));
        assert_eq!(process(locks, 7), None);
    }
}
