//! What the verifier thought of a loaded program: how many instructions it went through,
//! and how deep the stack gets.
//!
//! The kernel tells the first. The second is read off the instructions that it holds:
//! what each function touches below the frame pointer, summed along the deepest chain of
//! calls with each frame rounded up as the verifier does.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result, ensure};
use bytemuck::{Pod, Zeroable};

/// More instructions than this, and a program counts as too large.
pub const LIMIT_INSTRUCTIONS: u32 = 145_000;
/// Bytes of stack that the kernel gives a chain of calls.
pub const LIMIT_STACK: u32 = 512;

/// How many instructions a program may have whose golden says `golden`.
pub fn allowance(golden: u32) -> u32 {
    golden + golden / 10
}

/// A loaded program.
#[derive(Clone, Debug)]
pub struct Program {
    /// Instructions that the verifier went through.
    pub verified: u32,
    /// Instructions that the kernel holds.
    pub translated: u32,
    /// Bytes of stack of the functions in the deepest chain of calls, from the entry on.
    pub chain: Vec<u32>,
}

impl Program {
    /// Asks the kernel.
    ///
    /// # Errors
    /// Those of BPF_OBJ_GET_INFO_BY_FD, or instructions that make no sense.
    pub fn of(program: BorrowedFd<'_>) -> Result<Self> {
        let mut info = Info::zeroed();
        get_info(program, &mut info)?;
        let verified = info.verified_insns;
        let length = info.xlated_prog_len as usize / size_of::<Instruction>();
        let mut instructions = vec![Instruction::zeroed(); length];
        // Only what is asked for is set: the kernel fills in every array it is given.
        info = Info {
            xlated_prog_len: info.xlated_prog_len,
            xlated_prog_insns: instructions.as_mut_ptr() as u64,
            ..Info::zeroed()
        };
        get_info(program, &mut info)?;
        ensure!(info.xlated_prog_insns != 0, "the kernel does not show the instructions");
        let functions = functions(&instructions)?;
        let mut known = BTreeMap::new();
        let chain = deepest(0, &functions, &mut known).context("the program has no entry")?;
        Ok(Self { verified, translated: length as u32, chain })
    }

    /// Bytes of stack along the deepest chain of calls, as the verifier counts them.
    pub fn stack(&self) -> u32 {
        self.chain.iter().map(|bytes| rounded(*bytes)).sum()
    }
}

/// The verifier rounds a frame up so where programs are compiled.
fn rounded(bytes: u32) -> u32 {
    bytes.next_multiple_of(16)
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn destination(self) -> u8 {
        self.registers & 0x0f
    }

    fn source(self) -> u8 {
        self.registers >> 4
    }

    /// BPF_PSEUDO_CALL: a call of another function of the program.
    fn is_call(self) -> bool {
        self.code == 0x85 && self.source() == 1
    }
}

/// A function of a program: bytes of stack, and the functions it calls.
#[derive(Clone, Debug, Default)]
struct Function {
    stack: u32,
    calls: Vec<usize>,
}

/// Splits a program into its functions, by where each begins.
fn functions(instructions: &[Instruction]) -> Result<BTreeMap<usize, Function>> {
    // A compiled program's calls hold the distance in `offset`.
    let callee = |at: usize, instruction: &Instruction| {
        usize::try_from(at as i64 + i64::from(instruction.offset) + 1)
            .ok()
            .filter(|start| *start < instructions.len())
            .with_context(|| format!("instruction {at} calls what is not there"))
    };
    let mut functions = BTreeMap::from([(0, Function::default())]);
    for (at, instruction) in instructions.iter().enumerate().filter(|(_, one)| one.is_call()) {
        functions.entry(callee(at, instruction)?).or_default();
    }
    let starts: Vec<usize> = functions.keys().copied().collect();
    for (position, start) in starts.iter().enumerate() {
        let end = starts.get(position + 1).copied().unwrap_or(instructions.len());
        let body = &instructions[*start..end];
        let mut calls = Vec::new();
        for (at, instruction) in body.iter().enumerate().filter(|(_, one)| one.is_call()) {
            calls.push(callee(start + at, instruction)?);
        }
        functions.insert(*start, Function { stack: stack(body), calls });
    }
    Ok(functions)
}

/// How far below the frame pointer a function reaches: by loads and stores, and by
/// pointers it makes (`r = r10; r += -n`).
fn stack(body: &[Instruction]) -> u32 {
    const FRAME_POINTER: u8 = 10;
    const LOAD: u8 = 1;
    const STORE: u8 = 2;
    const STORE_REGISTER: u8 = 3;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let mut deepest = 0;
    let mut derived = [false; 16];
    derived[usize::from(FRAME_POINTER)] = true;
    for instruction in body {
        let to = usize::from(instruction.destination());
        let reached = match instruction.code & 7 {
            LOAD if instruction.source() == FRAME_POINTER => i32::from(instruction.offset),
            STORE | STORE_REGISTER if instruction.destination() == FRAME_POINTER => {
                i32::from(instruction.offset)
            }
            _ if instruction.code == ADD && derived[to] => instruction.immediate,
            _ => 0,
        };
        deepest = deepest.min(reached);
        if to != usize::from(FRAME_POINTER)
            && !matches!(instruction.code & 7, STORE | STORE_REGISTER)
        {
            derived[to] = instruction.code == MOVE && instruction.source() == FRAME_POINTER;
        }
    }
    deepest.unsigned_abs()
}

/// The chain of calls from `start` that takes most stack.
fn deepest(
    start: usize,
    functions: &BTreeMap<usize, Function>,
    known: &mut BTreeMap<usize, Vec<u32>>,
) -> Option<Vec<u32>> {
    if let Some(chain) = known.get(&start) {
        return Some(chain.clone());
    }
    let function = functions.get(&start)?;
    let sum = |chain: &Vec<u32>| chain.iter().map(|bytes| rounded(*bytes)).sum::<u32>();
    let below = function
        .calls
        .iter()
        .filter_map(|callee| deepest(*callee, functions, known))
        .max_by_key(sum)
        .unwrap_or_default();
    let chain: Vec<u32> = std::iter::once(function.stack).chain(below).collect();
    known.insert(start, chain.clone());
    Some(chain)
}

/// The beginning of `struct bpf_prog_info`, up to and with what is read here.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Info {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    between: [u64; 22],
    verified_insns: u32,
    attach_btf_obj_id: u32,
}

const _: () = assert!(std::mem::offset_of!(Info, verified_insns) == 216);

fn get_info(program: BorrowedFd<'_>, info: &mut Info) -> Result<()> {
    /// BPF_OBJ_GET_INFO_BY_FD.
    const COMMAND: libc::c_long = 15;
    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    struct Attributes {
        descriptor: u32,
        length: u32,
        info: u64,
    }
    let attributes = Attributes {
        descriptor: program.as_raw_fd() as u32,
        length: size_of::<Info>() as u32,
        info: std::ptr::from_mut(info) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, and instructions where
    // `info` points to room for as many bytes as it says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            COMMAND,
            std::ptr::from_ref(&attributes),
            size_of::<Attributes>(),
        )
    };
    ensure!(result == 0, "bpf_prog_info: {}", io::Error::last_os_error());
    Ok(())
}
