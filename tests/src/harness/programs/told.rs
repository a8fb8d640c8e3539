//! How many instructions the verifier went through, from its log: kernels before 5.16 tell it
//! nowhere else, and aya asks for the log of a refused program only. So the programs are put
//! together once more and loaded with a buffer for it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use aya_obj::generated::bpf_attach_type::{self, BPF_XDP};
use aya_obj::generated::bpf_cmd::BPF_PROG_LOAD;
use aya_obj::generated::bpf_prog_type::{
    BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_SCHED_CLS, BPF_PROG_TYPE_XDP,
};
use aya_obj::{Object, ProgramSection};
use bytemuck::{Pod, Zeroable};

use super::{Programs, constants, data, object_path};

/// The start of what BPF_PROG_LOAD reads of `union bpf_attr`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

impl Programs {
    /// For each program, how many instructions the verifier says that it went through.
    ///
    /// # Errors
    /// The object cannot be read, or the kernel refuses a program.
    pub fn told(&self) -> Result<BTreeMap<String, u32>> {
        let object = self.linked()?;
        let count = |(name, program): (&String, &aya_obj::Program)| {
            let function = object.functions.get(&program.function_key());
            let function = function.with_context(|| format!("program {name} has no code"))?;
            let code = &function.instructions;
            let (kind, attach_type) = kind(&program.section)?;
            let attributes = Load {
                kind,
                attach_type,
                instruction_count: code.len() as u32,
                instructions: code.as_ptr() as u64,
                license: program.license.as_ptr() as u64,
                ..Load::zeroed()
            };
            let count = ask(attributes).with_context(|| format!("program {name}"))?;
            Ok((name.clone(), count))
        };
        object.programs.iter().map(count).collect()
    }

    /// The object with the maps of this and the constants of this kernel.
    fn linked(&self) -> Result<Object> {
        let path = object_path();
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut object = Object::parse(&bytes)?;
        let constants = constants().map(|(name, value)| (name, value.to_ne_bytes()));
        let globals: HashMap<&str, (&[u8], bool)> =
            constants.iter().map(|(name, value)| (*name, (&value[..], true))).collect();
        object.patch_map_data(globals)?;
        let sections: HashSet<usize> =
            object.functions.keys().map(|(section, _)| *section).collect();
        let maps = object.maps.clone();
        let mut descriptors = Vec::new();
        for (name, map) in &maps {
            let loaded = self.ebpf.map(name).and_then(data);
            let loaded = loaded.with_context(|| format!("map {name} is not loaded"))?;
            descriptors.push((name.as_str(), loaded.fd().as_fd().as_raw_fd(), map));
        }
        object.relocate_maps(descriptors.into_iter(), &sections)?;
        object.relocate_calls(&sections)?;
        Ok(object)
    }
}

fn kind(section: &ProgramSection) -> Result<(u32, u32)> {
    Ok(match section {
        ProgramSection::SchedClassifier => (BPF_PROG_TYPE_SCHED_CLS as u32, 0),
        ProgramSection::Xdp { .. } => (BPF_PROG_TYPE_XDP as u32, BPF_XDP as u32),
        ProgramSection::CgroupSockAddr { attach_type } => {
            (BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32, bpf_attach_type::from(*attach_type) as u32)
        }
        other => bail!("unexpected kind of program: {other:?}"),
    })
}

/// Loads a program for its log alone.
fn ask(mut attributes: Load) -> Result<u32> {
    /// BPF_LOG_STATS: what it came to, without the instructions.
    const STATS: u32 = 4;
    let mut log = vec![0u8; 1 << 16];
    attributes.log_level = STATS;
    attributes.log_size = log.len() as u32;
    attributes.log = log.as_mut_ptr() as u64;
    // SAFETY: the code and the license outlive the call, and the log has room for as many
    // bytes as it says.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD as libc::c_long,
            std::ptr::from_ref(&attributes),
            size_of::<Load>(),
        )
    };
    let error = io::Error::last_os_error();
    let text = String::from_utf8_lossy(&log);
    let text = text.trim_end_matches('\0');
    ensure!(descriptor >= 0, "the kernel refused it: {error}\n{text}");
    // SAFETY: the kernel has just made this descriptor for us alone.
    drop(unsafe { OwnedFd::from_raw_fd(descriptor as i32) });
    processed(text).with_context(|| format!("no count in the verifier's log: {text}"))
}

/// `processed 4711 insns (limit 1000000) …`
fn processed(log: &str) -> Option<u32> {
    let (_, rest) = log.split_once("processed ")?;
    rest.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_ends_with_the_count() {
        let log = "verification time 57 usec\nstack depth 16+8\n\
                   processed 4711 insns (limit 1000000) max_states_per_insn 2\n";
        assert_eq!(processed(log), Some(4711));
        assert_eq!(processed(""), None);
    }
}
