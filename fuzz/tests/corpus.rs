//! Every input of the repository, as it is and damaged, the same at each run.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lb_fuzz::{
    TARGETS, Target,
    corpus::{self, Input},
};
use lb_testing::random::Random;

/// How often each input is damaged.
const MUTANTS: usize = 150;

/// A few changes: of bytes, of the length, and parts of another input, or of this one again.
fn damage(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let to = at + random.below((bytes.len() - at).min(16) + 1);
        let from = random.below(other.len() + 1);
        let part = &other[from..from + random.below((other.len() - from).min(64) + 1)];
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..to)),
            2 => drop(bytes.splice(at..to, part.iter().copied())),
            3 => bytes.insert(at, random.byte()),
            4 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ if at < bytes.len() => {
                bytes[at] = [0, 0xff, b'0', b'-', random.byte()][random.below(5)]
            }
            _ => {}
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
    let mut random = Random::new(1);
    for Input { name, bytes } in &inputs {
        run(target, name, bytes);
        for number in 0..MUTANTS {
            let other = &inputs[random.below(inputs.len())].bytes;
            let mut mutant = bytes.clone();
            damage(&mut random, &mut mutant, other);
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
