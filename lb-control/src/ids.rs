//! Allocation of indices, ids and slots. A number gets a new meaning only after every packet
//! that may still know the old meaning has left the programs.
//!
//! A freed number waits in quarantine until a grace period is over. The clock is an
//! argument: milliseconds that never go back.

pub mod slots;

use std::collections::VecDeque;

/// Things that wait for the grace period to be over, oldest first.
///
/// The wait begins with the first [`expire`](Self::expire) after [`add`](Self::add), not with
/// `add`: by then the writes that took the thing out of use are done.
#[derive(Debug)]
pub struct Quarantine<T> {
    fresh: Vec<T>,
    waiting: VecDeque<(u64, T)>,
}

impl<T> Default for Quarantine<T> {
    fn default() -> Self {
        Self { fresh: Vec::new(), waiting: VecDeque::new() }
    }
}

impl<T> Quarantine<T> {
    /// Adds something that is about to go out of use.
    pub fn add(&mut self, thing: T) {
        self.fresh.push(thing);
    }

    /// Starts the wait of everything that was added since the last call, and returns the
    /// things that have waited for `grace` milliseconds.
    pub fn expire(&mut self, now: u64, grace: u64) -> Vec<T> {
        self.waiting.extend(self.fresh.drain(..).map(|thing| (now, thing)));
        let is_due = |since: u64| now.saturating_sub(since) >= grace;
        let due = self.waiting.iter().take_while(|(since, _)| is_due(*since)).count();
        self.waiting.drain(..due).map(|(_, thing)| thing).collect()
    }

    /// When the next thing may be due, if any is waiting.
    pub fn next_due(&self, now: u64, grace: u64) -> Option<u64> {
        let oldest = self.waiting.front().map(|(since, _)| since.saturating_add(grace));
        oldest.or_else(|| (!self.fresh.is_empty()).then_some(now))
    }
}

/// What the maps say about a number at adoption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It is in use.
    Used,
    /// It is free; its next meaning gets this generation.
    Free(u16),
    /// It may have been in use until just now; its generation is this one since then.
    JustFreed(u16),
}

/// A space of numbers, each with a count of how often its meaning changed.
#[derive(Debug)]
pub struct Numbers {
    limit: u32,
    unused_from: u32,
    free: VecDeque<(u32, u16)>,
    quarantine: Quarantine<(u32, u16)>,
}

impl Numbers {
    /// The numbers from `first` to below `limit`, none ever used.
    pub fn new(first: u32, limit: u32) -> Self {
        Self {
            limit,
            unused_from: first.min(limit),
            free: VecDeque::new(),
            quarantine: Quarantine::default(),
        }
    }

    /// The numbers from `first` to below `limit`, given what is known of each number
    /// from 0 on.
    pub fn adopt(first: u32, limit: u32, known: impl Iterator<Item = Known>) -> Self {
        let mut numbers = Self::new(first, limit);
        let known = (0..limit).zip(known).skip(first as usize);
        let mut idle = Vec::new();
        for (number, known) in known {
            match known {
                Known::Free(generation) => {
                    idle.push((number, generation));
                    if generation == 0 {
                        continue;
                    }
                }
                Known::Used => {}
                Known::JustFreed(generation) => numbers.quarantine.add((number, generation)),
            }
            numbers.free.extend(idle.drain(..));
            numbers.unused_from = number + 1;
        }
        numbers
    }

    /// How many can be allocated now.
    pub fn available(&self) -> usize {
        self.free.len() + (self.limit - self.unused_from) as usize
    }

    /// Allocates a number, and returns it with the generation of its new meaning.
    pub fn allocate(&mut self) -> Option<(u32, u16)> {
        if let Some(free) = self.free.pop_front() {
            return Some(free);
        }
        let number = self.unused_from;
        (number < self.limit).then(|| {
            self.unused_from += 1;
            (number, 0)
        })
    }

    /// Frees a number once the grace period is over. `generation` already counts this change
    /// of meaning.
    pub fn free_after_grace(&mut self, number: u32, generation: u16) {
        self.quarantine.add((number, generation));
    }

    /// Makes the numbers available whose grace period is over, and returns them. They get one
    /// more generation, because a packet that was in a program when the number was freed may
    /// have noted the generation that it got then.
    pub fn reclaim(&mut self, now: u64, grace: u64) -> Vec<(u32, u16)> {
        let mut due = self.quarantine.expire(now, grace);
        due.iter_mut().for_each(|(_, generation)| *generation = generation.wrapping_add(1));
        self.free.extend(&due);
        due
    }

    /// When the next number may become available, if any is waiting.
    pub fn next_due(&self, now: u64, grace: u64) -> Option<u64> {
        self.quarantine.next_due(now, grace)
    }
}

#[cfg(test)]
mod tests;
