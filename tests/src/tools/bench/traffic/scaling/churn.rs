//! Changes of endpoints at a steady rate, while something else is measured.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::objects::Used;
use super::site::{SLICES, Site};
use crate::tools::bench::scale::api::modified;

/// Does `work` while so many changes a second come to Services that the work does not use: one of
/// their endpoints becomes ready or not.
///
/// # Errors
/// That of `work`; or nobody watches.
pub fn during<T>(site: &Site, rate: u32, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if rate == 0 {
        return work();
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(site, rate, &stop));
        let done = work();
        stop.store(true, Ordering::Relaxed);
        sender.join().ok().context("the sender panicked")??;
        done
    })
}

fn send(site: &Site, rate: u32, stop: &AtomicBool) -> Result<()> {
    let size = site.size;
    let least_used = Used::OTHERS.map(|used| used.number(size.services)).into_iter().min();
    let unused = least_used.context("no Service is used")?;
    let start = Instant::now();
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        let due = start + Duration::from_secs(1) * sent / rate;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // Each turn through the Services changes what the one before has made of them.
        let number = site.changes.fetch_add(1, Ordering::Relaxed);
        let (service, is_ready) = (number % unused, number / unused % 2 == 1);
        let slice = site.size.slice(service, is_ready);
        site.api.send(SLICES, &modified(&slice))?;
        sent += 1;
    }
    Ok(())
}
