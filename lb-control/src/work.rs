//! Counts steps, so that tests can state how work grows: with what changed, not with what there is.
//! Outside of tests it is nothing.

#[cfg(test)]
thread_local! {
    static STEPS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Counts so many steps.
#[cfg(test)]
pub(crate) fn count(steps: usize) {
    STEPS.set(STEPS.get() + steps);
}

/// Counts nothing.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn count(_: usize) {}

/// The steps that this thread counts while `work` runs.
#[cfg(test)]
pub(crate) fn of<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = STEPS.replace(0);
    let result = work();
    (STEPS.replace(before), result)
}
