//! Loads every program of the object, and compares stack and instruction counts of the verifier
//! and the maps' names and layouts with the golden files. `LB_BLESS=1` writes these files.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

use anyhow::{Context, Result};
use lb_tests::harness::programs::{Programs, program_descriptor};
use lb_tests::harness::verify::{LIMIT_INSTRUCTIONS, LIMIT_STACK, Program, allowance};

fn main() -> Result<ExitCode> {
    let loaded = Programs::load(&[])?;
    let bless = env::var_os("LB_BLESS").is_some();
    let programs = loaded
        .programs()
        .into_iter()
        .map(|(name, program)| {
            let verified = Program::of(program_descriptor(program)?);
            Ok((name, verified.with_context(|| format!("program {name}"))?))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut complaints = verifier(&programs, bless)?;
    complaints.extend(maps(&loaded, bless)?);
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    Ok(if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/golden")).join(name)
}

/// Prints the table; returns a complaint for each value above its limit or its golden.
fn verifier(programs: &[(&str, Program)], bless: bool) -> Result<Vec<String>> {
    let path = golden("verifier.txt");
    if bless {
        let mut text = String::from("# program, instructions that the verifier went through\n");
        for (name, program) in programs {
            writeln!(text, "{name} {}", program.verified)?;
        }
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let text = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    let known: BTreeMap<&str, u32> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, count)| Some((name, count.parse().ok()?)))
        .collect();
    let mut complaints = Vec::new();
    println!(
        "{:<14} {:>6} {:>9} {:>9} {:>9} {:>10}  stack of the deepest chain of calls",
        "program", "stack", "verified", "golden", "allowed", "translated"
    );
    for (name, program) in programs {
        let golden = known.get(name).copied();
        let allowed = allowance(golden.unwrap_or(0));
        let shown = golden.map_or("none".to_owned(), |golden| golden.to_string());
        let parts: Vec<String> = program.chain.iter().map(u32::to_string).collect();
        println!(
            "{name:<14} {:>6} {:>9} {shown:>9} {allowed:>9} {:>10}  {}",
            program.stack(),
            program.verified,
            program.translated,
            parts.join("+")
        );
        if program.verified > allowed {
            complaints.push(format!(
                "{name}: the verifier walks through {} instructions, {allowed} are allowed \
                 (`cargo xtask check --bless` accepts them)",
                program.verified
            ));
        }
        if program.verified >= LIMIT_INSTRUCTIONS || program.stack() > LIMIT_STACK {
            complaints.push(format!(
                "{name}: {} instructions and {} bytes of stack; the limits are \
                 {LIMIT_INSTRUCTIONS} and {LIMIT_STACK}",
                program.verified,
                program.stack()
            ));
        }
    }
    for name in known.keys().filter(|name| programs.iter().all(|(other, _)| other != *name)) {
        complaints.push(format!("program {name} is gone (`cargo xtask check --bless`)"));
    }
    Ok(complaints)
}

/// Compares the maps with the golden file; returns a complaint for each difference.
fn maps(loaded: &Programs, bless: bool) -> Result<Vec<String>> {
    let mut text = String::from("# map, type, bytes of key and value, entries, flags\n");
    for (name, map) in loaded.maps() {
        let info = map.info().with_context(|| format!("map {name}"))?;
        let kind = info.map_type().with_context(|| format!("map {name}"))?;
        writeln!(
            text,
            "{name} {kind:?} {} {} {} {:#x}",
            info.key_size(),
            info.value_size(),
            info.max_entries(),
            info.map_flags()
        )?;
    }
    let path = golden("maps.txt");
    if bless {
        fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let known = fs::read_to_string(&path).unwrap_or_default();
    Ok(differences(&known, &text)
        .into_iter()
        .map(|line| format!("maps: {line} (raise ABI_VERSION, then `cargo xtask check --bless`)"))
        .collect())
}

fn differences(known: &str, now: &str) -> Vec<String> {
    let missing = known.lines().filter(|line| now.lines().all(|other| other != *line));
    let new = now.lines().filter(|line| known.lines().all(|other| other != *line));
    missing
        .map(|line| format!("no longer `{line}`"))
        .chain(new.map(|line| format!("now `{line}`")))
        .collect()
}
