//! What a program is linked to, from its ELF headers: nothing is run, so it may be a program of
//! another architecture.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::Endianness;
use object::elf::{EM_AARCH64, EM_X86_64, FileHeader64};
use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader};

use crate::architecture::Architecture;

/// A library, or the dynamic linker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Library {
    /// Where programs look for it.
    pub(crate) path: String,
    /// Where it is on this machine.
    pub(crate) file: PathBuf,
    /// The path by which the kernel finds the dynamic linker.
    pub(crate) link: Option<String>,
}

/// What the headers of a program or library say.
struct Linked {
    needed: Vec<String>,
    interpreter: Option<String>,
}

/// The dynamic linker of a program, and every library that it or another one needs, sorted. They
/// are looked for in `root`, which stands for `/`.
pub(crate) fn libraries(binary: &[u8], root: &Path) -> Result<Vec<Library>> {
    let triplet = architecture(binary)?.triplet();
    let program = linked(binary)?;
    let mut found: BTreeMap<String, Library> = BTreeMap::new();
    let mut wanted = program.needed;
    if let Some(interpreter) = program.interpreter {
        let name = interpreter.rsplit('/').next().unwrap_or_default().to_owned();
        let library = Library { link: Some(interpreter), ..find(&name, triplet, root)? };
        found.insert(name, library);
    }
    while let Some(name) = wanted.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let library = find(&name, triplet, root)?;
        let bytes = fs::read(&library.file)
            .with_context(|| format!("cannot read {}", library.file.display()))?;
        wanted.extend(linked(&bytes).with_context(|| library.file.display().to_string())?.needed);
        found.insert(name, library);
    }
    Ok(found.into_values().collect())
}

/// Where Debian's packages keep what such a program loads while it runs.
pub(crate) fn library_directory(binary: &[u8]) -> Result<PathBuf> {
    Ok(Path::new("/usr/lib").join(architecture(binary)?.triplet()))
}

/// The program `strip` that knows the format of a program.
pub(crate) fn strip(binary: &[u8]) -> Result<String> {
    let architecture = architecture(binary)?;
    Ok(if architecture == Architecture::HOST {
        "strip".to_owned()
    } else {
        format!("{}-strip", architecture.triplet())
    })
}

/// The architecture of a program.
pub(crate) fn architecture(binary: &[u8]) -> Result<Architecture> {
    let header = FileHeader64::<Endianness>::parse(binary).context("not an ELF program")?;
    match header.e_machine(header.endian()?) {
        EM_X86_64 => Ok(Architecture::Amd64),
        EM_AARCH64 => Ok(Architecture::Arm64),
        other => bail!("a program for ELF machine {other}: only x86-64 and AArch64 are known"),
    }
}

fn linked(binary: &[u8]) -> Result<Linked> {
    let file = ElfFile64::<Endianness>::parse(binary).context("not an ELF file")?;
    let endian = file.endian();
    let mut interpreter = None;
    for header in file.elf_program_headers() {
        if let Some(path) = header.interpreter(endian, binary)? {
            interpreter = Some(String::from_utf8_lossy(path).into_owned());
        }
    }
    let sections = file.elf_section_table();
    let mut needed = Vec::new();
    if let Some((entries, strings)) = sections.dynamic(endian, binary)? {
        let strings = sections.strings(endian, binary, strings)?;
        for entry in entries.iter().filter(|entry| entry.tag(endian) == object::elf::DT_NEEDED) {
            let name = entry.string(endian, strings)?;
            needed.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(Linked { needed, interpreter })
}

/// Finds a library where the dynamic linker of Debian looks by itself.
fn find(name: &str, triplet: &str, root: &Path) -> Result<Library> {
    let places = ["lib", "usr/lib"].map(|lib| root.join(lib).join(triplet).join(name));
    let file = places.iter().find(|file| file.is_file());
    let file =
        file.with_context(|| format!("the program needs {name}, which is in none of {places:?}"))?;
    Ok(Library { path: format!("/lib/{triplet}/{name}"), file: file.clone(), link: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_has_its_linker_and_the_libraries_of_its_libraries() {
        let program = std::env::current_exe().expect("this program");
        let bytes = fs::read(program).expect("its bytes");
        let found = libraries(&bytes, Path::new("/")).expect("libraries");
        let linker = found.iter().find(|library| library.link.is_some()).expect("a linker");
        assert!(linker.path.contains("/ld-linux-"), "{linker:?}");
        assert!(linker.link.as_ref().is_some_and(|link| link.starts_with("/lib")), "{linker:?}");
        let libc = found.iter().find(|library| library.path.ends_with("/libc.so.6"));
        assert!(libc.is_some_and(|libc| libc.file.is_file()), "{found:?}");
    }

    /// This program, as if it were for another machine.
    fn of_machine(machine: u16) -> Vec<u8> {
        /// `e_machine` (elf(5)).
        const MACHINE: std::ops::Range<usize> = 18..20;
        let program = std::env::current_exe().expect("this program");
        let mut bytes = fs::read(program).expect("its bytes");
        bytes[MACHINE].copy_from_slice(&machine.to_le_bytes());
        bytes
    }

    #[test]
    fn a_program_of_another_architecture_is_told_by_its_header() {
        let known = [EM_X86_64, EM_AARCH64].map(|machine| architecture(&of_machine(machine)));
        assert_eq!(known.map(|known| known.expect("it is known").name()), ["amd64", "arm64"]);
        let foreign = if cfg!(target_arch = "x86_64") { EM_AARCH64 } else { EM_X86_64 };
        let strip = strip(&of_machine(foreign)).expect("a name");
        assert!(strip.ends_with("-linux-gnu-strip"), "{strip}");
        let riscv = architecture(&of_machine(243)).expect_err("it is not known").to_string();
        assert!(riscv.contains("ELF machine 243") && riscv.contains("AArch64"), "{riscv}");
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        let error = architecture(b"#!/bin/sh\n")
            .map_or_else(|error| error.to_string(), |found| found.name().to_owned());
        assert_eq!(error, "not an ELF program");
    }
}
