//! Every input of the repository, as it is and damaged, the same at each run.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lb_fuzz::{
    TARGETS, Target,
    corpus::{self, Input},
};

/// How often each input is damaged.
const MUTANTS: usize = 150;

/// xorshift64 (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }

    /// A few changes: of bytes, of the length, and parts of another input, or of this one again.
    fn damage(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            let to = at + self.below((bytes.len() - at).min(16) + 1);
            let from = self.below(other.len() + 1);
            let part = &other[from..from + self.below((other.len() - from).min(64) + 1)];
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => drop(bytes.drain(at..to)),
                2 => drop(bytes.splice(at..to, part.iter().copied())),
                3 => bytes.insert(at, self.0 as u8),
                4 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                _ if at < bytes.len() => {
                    bytes[at] = [0, 0xff, b'0', b'-', self.0 as u8][self.below(5)]
                }
                _ => {}
            }
        }
    }
}

fn run(target: Target, what: &str, bytes: &[u8]) {
    let result = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    assert!(result.is_ok(), "{}: {what} fails: {}", target.name, bytes.escape_ascii());
}

fn check(name: &str) {
    let target = lb_fuzz::target(name).expect("a target");
    let inputs = corpus::read(name).expect("its inputs can be read");
    assert!(inputs.len() >= 3, "{name} has {} inputs", inputs.len());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for Input { name, bytes } in &inputs {
        run(target, name, bytes);
        for number in 0..MUTANTS {
            let other = &inputs[random.below(inputs.len())].bytes;
            let mut mutant = bytes.clone();
            random.damage(&mut mutant, other);
            run(target, &format!("{name}, damaged ({number}),"), &mutant);
        }
    }
}

#[test]
fn every_target_has_a_test_here() {
    let names = ["manifests", "configuration", "netlink", "packets"];
    assert_eq!(TARGETS.map(|target| target.name), names);
}

#[test]
fn manifests_of_any_bytes_are_read_or_refused() {
    check("manifests");
}

#[test]
fn configuration_of_any_bytes_is_read_or_refused() {
    check("configuration");
}

#[test]
fn netlink_of_any_bytes_is_read_or_skipped() {
    check("netlink");
}

#[test]
fn packets_of_any_bytes_are_decided_on() {
    check("packets");
}
