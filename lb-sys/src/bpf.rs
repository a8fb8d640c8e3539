//! bpf(2): links, pins, programs, and the kernel's information on them.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{bpf_cmd, bpf_prog_type};
use bytemuck::{Pod, Zeroable};

/// Calls bpf(2). `attributes` is the leading part of `union bpf_attr` that `command`
/// reads; the kernel treats the rest as zeros.
///
/// # Safety
/// Every address in `attributes` that `command` reads or writes is valid for as many bytes as the
/// kernel copies.
pub(super) unsafe fn bpf<T: Pod>(command: bpf_cmd, attributes: &mut T) -> io::Result<i64> {
    // SAFETY: `attributes` is valid for its size, and the caller guarantees the addresses in it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub(super) fn owned(descriptor: i64) -> OwnedFd {
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(descriptor as i32) }
}

fn raw(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd() as u32
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Object {
    pathname: u64,
    descriptor: u32,
    file_flags: u32,
}

/// Pins a map, program or link at `path`, which must be on a bpffs.
///
/// # Errors
/// Those of BPF_OBJ_PIN.
pub fn obj_pin(descriptor: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attributes =
        Object { pathname: path.as_ptr() as u64, descriptor: raw(descriptor), file_flags: 0 };
    // SAFETY: `pathname` is a C string that outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attributes) }.map(drop)
}

/// Opens the object that is pinned at `path`.
///
/// # Errors
/// Those of BPF_OBJ_GET.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attributes = Object { pathname: path.as_ptr() as u64, descriptor: 0, file_flags: 0 };
    // SAFETY: `pathname` is a C string that outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attributes) }.map(owned)
}

/// The target that a link attaches a program to.
#[derive(Clone, Copy, Debug)]
pub enum LinkTarget<'a> {
    /// An interface, by index, in the network namespace of the caller; behind the programs that are
    /// there.
    Interface(u32),
    /// The same, in front of them.
    InterfaceFirst(u32),
    /// An interface, by index, with XDP_FLAGS_DRV_MODE or XDP_FLAGS_SKB_MODE.
    Xdp {
        /// The index of the interface.
        interface: u32,
        /// The mode.
        flags: u32,
    },
    /// A cgroup v2 directory.
    Cgroup(BorrowedFd<'a>),
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    zero: u32,
    expected_revision: u64,
}

/// Attaches `program` by a new link. `attach_type` is one of `enum bpf_attach_type`.
///
/// # Errors
/// Those of BPF_LINK_CREATE; EINVAL for tcx on a kernel before 6.6.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: LinkTarget<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    /// BPF_F_BEFORE; without a relative program: before all.
    const BEFORE: u32 = 1 << 3;
    let (target, flags) = match target {
        LinkTarget::Interface(index) => (index, 0),
        LinkTarget::InterfaceFirst(index) => (index, BEFORE),
        LinkTarget::Xdp { interface, flags } => (interface, flags),
        LinkTarget::Cgroup(directory) => (raw(directory), 0),
    };
    let mut attributes =
        LinkCreate { program: raw(program), target, attach_type, flags, ..LinkCreate::zeroed() };
    // SAFETY: the attributes contain no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attributes) }.map(owned)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkUpdate {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

/// Replaces the program of `link` atomically: every packet or call runs exactly one of the two.
///
/// # Errors
/// Those of BPF_LINK_UPDATE; ENOLINK if its target is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes =
        LinkUpdate { link: raw(link), new_program: raw(program), flags: 0, old_program: 0 };
    // SAFETY: the attributes contain no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Detaches `link`, even if it is still pinned or open.
///
/// # Errors
/// Those of BPF_LINK_DETACH.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = raw(link);
    // SAFETY: the attributes contain no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attributes) }.map(drop)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GetInfo {
    descriptor: u32,
    length: u32,
    info: u64,
}

fn info<T: Pod>(descriptor: BorrowedFd<'_>) -> io::Result<T> {
    let mut value = T::zeroed();
    let mut attributes = GetInfo {
        descriptor: raw(descriptor),
        length: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut value) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`. The addresses of further buffers
    // that it reads from there are zero, so it writes to no other buffer.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(value)
}

/// The start of the kernel's `struct bpf_map_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct MapInfo {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// The kernel's id of the map.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// The capacity.
    pub max_entries: u32,
    /// BPF_F_*.
    pub flags: u32,
    /// The name, cut to 15 bytes.
    pub name: [u8; 16],
}

/// The kernel's information on a map.
///
/// # Errors
/// Those of BPF_OBJ_GET_INFO_BY_FD.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

/// The start of the kernel's `struct bpf_prog_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ProgramInfo {
    /// `enum bpf_prog_type`.
    pub program_type: u32,
    /// The kernel's id of the program.
    pub id: u32,
    /// A hash of its instructions.
    pub tag: [u8; 8],
    reserved: [u32; 12],
    /// The name, cut to 15 bytes.
    pub name: [u8; 16],
}

impl ProgramInfo {
    /// The name as text.
    pub fn name(&self) -> String {
        let bytes = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }
}

/// The kernel's information on a program.
///
/// # Errors
/// Those of BPF_OBJ_GET_INFO_BY_FD.
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    info(program)
}

/// The start of the kernel's `struct bpf_link_info`, with the parts for tcx, XDP and cgroup links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LinkInfo {
    /// `enum bpf_link_type`.
    pub link_type: u32,
    /// The kernel's id of the link.
    pub id: u32,
    /// The id of its program.
    pub program: u32,
    zero: u32,
    /// tcx and XDP: index of the interface, 0 once that is gone; tcx: attach type. cgroup:
    /// the directory's id, low word first.
    pub target: [u32; 2],
    /// cgroup: attach type.
    pub attach_type: u32,
    zero_too: u32,
}

/// The kernel's information on a link.
///
/// # Errors
/// Those of BPF_OBJ_GET_INFO_BY_FD.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GetById {
    id: u32,
    next: u32,
    flags: u32,
}

/// Opens the program with the kernel's id `id`.
///
/// # Errors
/// Those of BPF_PROG_GET_FD_BY_ID.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attributes = GetById { id, next: 0, flags: 0 };
    // SAFETY: the attributes contain no address.
    unsafe { bpf(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attributes) }.map(owned)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    zero: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The ids of the programs attached to an interface by tcx, in the order in which they run.
///
/// # Errors
/// Those of BPF_PROG_QUERY; EINVAL on a kernel before 6.6.
pub fn tcx_query(interface: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64];
    let mut attributes = Query {
        target: interface,
        attach_type,
        program_ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..Query::zeroed()
    };
    // SAFETY: the kernel writes at most `count` ids to `program_ids`.
    unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attributes) }?;
    Ok(ids[..(attributes.count as usize).min(ids.len())].to_vec())
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TestRun {
    program: u32,
    returned: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    zero: u32,
}

/// Runs a classifier once on `packet` and returns its return value.
///
/// # Errors
/// Those of BPF_PROG_TEST_RUN; EINVAL for a packet shorter than an Ethernet header.
pub fn test_run(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<u32> {
    let mut attributes = TestRun {
        program: raw(program),
        data_size_in: packet.len() as u32,
        data_in: packet.as_ptr() as u64,
        repeat: 1,
        ..TestRun::zeroed()
    };
    // SAFETY: the kernel reads `data_size_in` bytes from `data_in`, and there is no output
    // buffer.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attributes) }?;
    Ok(attributes.returned)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 4],
}

/// Loads a classifier of a few instructions, each as the kernel's `struct bpf_insn`.
///
/// # Errors
/// Those of BPF_PROG_LOAD.
pub fn load_classifier(instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut attributes = Load {
        program_type: bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 4],
    };
    // SAFETY: the kernel reads `instruction_count` times 8 bytes from `instructions`, and
    // `license` is a C string.
    unsafe { bpf(bpf_cmd::BPF_PROG_LOAD, &mut attributes) }.map(owned)
}
