//! `lb-agent sysdump`: one archive for a bug report.
//!
//! It works with and without a running agent: a part that cannot be had is a file that says why.
//! It has no secret: files of credentials are named, never read, and what looks like one in a text
//! is replaced.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::ValueEnum as _;
use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;
use tar::{Builder, Header};

use super::{
    attached::on_hooks,
    check::{self, Check},
    get, status,
};
use crate::{
    cli::{CheckArgs, GetArgs, Output, SysdumpArgs, What},
    maps::pins::Pins,
    network::dump::dump,
    output,
    report::{self, Question, redacted},
};

/// The archive could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SysdumpError {
    /// The file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

/// A file of the archive.
type Part = (String, String);

/// Writes the archive; returns its path, or none if it went to stdout.
///
/// # Errors
/// [`SysdumpError`] if it cannot be written.
pub fn sysdump(arguments: &SysdumpArgs) -> Result<Option<PathBuf>, SysdumpError> {
    let now = Timestamp::now();
    let name = format!("lb-sysdump-{}", now.strftime("%Y%m%dT%H%M%SZ"));
    let path = match &arguments.out {
        Some(path) => path.clone(),
        None => format!("{name}.tar.gz").into(),
    };
    let failed = |source| SysdumpError::Write { path: path.clone(), source };
    let parts = collect(&arguments.check);
    if path == Path::new("-") {
        write(&name, &parts, now, output::stdout()).map_err(failed)?;
        return Ok(None);
    }
    write(&name, &parts, now, File::create(&path).map_err(failed)?).map_err(failed)?;
    Ok(Some(path))
}

fn collect(arguments: &CheckArgs) -> Vec<Part> {
    let bpf_dir = &arguments.pins.bpf_dir;
    let status = status::status(bpf_dir);
    let mut parts = vec![
        part("status.txt", status.render(Output::Table)),
        part("status.json", status.render(Output::Json)),
        ("check.txt".to_owned(), findings(arguments)),
        part("log.txt", report::ask(bpf_dir, Question::Log)),
        part("metrics.txt", report::ask(bpf_dir, Question::Metrics)),
    ];
    if let Some(report) = &status.agent {
        parts.push(part("configuration.json", json(&report.configuration)));
        parts.push(part("events.json", json(&report.refused)));
    }
    for what in What::value_variants() {
        let name = what.to_possible_value().map(|value| value.get_name().to_owned());
        let (what, output, pins) = (*what, Output::Json, arguments.pins.clone());
        let arguments = GetArgs { what, output, service: None, address: None, pins };
        let mut rows = Vec::new();
        let text =
            get::get(&arguments, &mut rows).map(|()| String::from_utf8_lossy(&rows).into_owned());
        parts.push(part(&format!("get/{}.json", name.unwrap_or_default()), text));
    }
    parts.push(part(
        "network/programs.json",
        on_hooks(&Pins::new(bpf_dir)).map(|all| json(&all).unwrap_or_default()),
    ));
    parts.extend(network());
    for (name, file) in [
        ("kernel.txt", "/proc/version"),
        ("memory.txt", "/proc/meminfo"),
        ("network/counters.txt", "/proc/net/snmp"),
        ("network/conntrack.txt", "/proc/sys/net/netfilter/nf_conntrack_count"),
    ] {
        parts.push(part(name, std::fs::read_to_string(file)));
    }
    parts.into_iter().map(|(name, text)| (name, redacted(&text))).collect()
}

fn findings(arguments: &CheckArgs) -> String {
    let options = Check::of(arguments);
    check::check(&options).iter().map(|finding| format!("{finding}\n")).collect()
}

fn network() -> Vec<Part> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let found = match runtime {
        Ok(runtime) => runtime.block_on(dump()).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match found {
        Ok(found) => {
            found.into_iter().map(|(name, text)| (format!("network/{name}.txt"), text)).collect()
        }
        Err(error) => vec![("network/error.txt".to_owned(), error)],
    }
}

fn json(value: &impl serde::Serialize) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(value)
}

/// A file with a text, or with the reason why there is none.
fn part<E: std::fmt::Display>(name: &str, text: Result<String, E>) -> Part {
    (name.to_owned(), text.unwrap_or_else(|error| format!("not available: {error}\n")))
}

fn write(name: &str, parts: &[Part], now: Timestamp, out: impl Write) -> io::Result<()> {
    let mut archive = Builder::new(GzEncoder::new(out, Compression::default()));
    for (path, text) in parts {
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(text.len() as u64);
        header.set_mtime(now.as_second().unsigned_abs());
        archive.append_data(&mut header, format!("{name}/{path}"), text.as_bytes())?;
    }
    archive.into_inner()?.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_archive_has_a_folder_of_its_own_with_every_part() {
        let parts = [("a.txt".to_owned(), "one".to_owned()), ("b/c.txt".to_owned(), String::new())];
        let mut bytes = Vec::new();
        write("lb-sysdump-x", &parts, Timestamp::now(), &mut bytes).expect("memory takes it");
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
        let read = archive.entries().expect("an archive").map(|entry| {
            let mut entry = entry.expect("an entry");
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("a text");
            (entry.path().expect("a path").display().to_string(), text)
        });
        let expected = [("lb-sysdump-x/a.txt", "one"), ("lb-sysdump-x/b/c.txt", "")]
            .map(|(name, text)| (name.to_owned(), text.to_owned()));
        assert_eq!(read.collect::<Vec<_>>(), expected);
    }
}
