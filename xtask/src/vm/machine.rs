//! Runs a virtual machine until it switches itself off, or until a time limit.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::DEVICES;
use super::debian::{Qemu, Release};
use super::image::{OBJECT, PROGRAMS};

/// How often qemu is polled.
const INTERVAL: Duration = Duration::from_millis(100);
/// The factor by which tests wait longer on an emulated machine.
const PATIENCE: u32 = 20;

/// The models of the NICs that the part `devices` tries. Each is wired to a virtio NIC, its far
/// end; `tests/src/tools/vm/devices.rs` finds both by their MACs.
const NICS: [&str; 3] = ["virtio-net-pci", "e1000e", "igb"];

/// The result of a machine.
pub(super) struct Console {
    /// All output.
    pub(super) text: String,
    pub(super) took: Duration,
}

/// Boots a machine whose console goes to `log`; one that runs longer than `limit` is ended.
pub(super) fn boot(
    qemu: &Qemu,
    release: &Release,
    image: &Path,
    only: &[String],
    log: &Path,
    limit: Duration,
) -> Result<Console> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let copy = file.try_clone().context("cannot share the log")?;
    let started = Instant::now();
    // Emulation uses every cycle that it gets, so other work goes first.
    let mut command = Command::new("nice");
    command
        .arg(&qemu.program)
        .args(&qemu.arguments)
        .args(["-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"])
        .args(["-smp", "2", "-m", "2048", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(&release.vmlinuz)
        .arg("-initrd")
        .arg(image)
        .args(if only.iter().any(|part| part == DEVICES) { nics() } else { Vec::new() })
        .args(["-append", &kernel_arguments(only)])
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(copy);
    if let Some(libraries) = &qemu.libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let mut child = command.spawn().context("cannot start qemu")?;
    let ended = wait(&mut child, started + limit);
    if !ended {
        child.kill().context("cannot end qemu")?;
        child.wait().context("cannot wait for qemu")?;
    }
    let bytes = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    Ok(Console { text: String::from_utf8_lossy(&bytes).into_owned(), took: started.elapsed() })
}

/// Arguments for pairs of NICs, each on a hub of its own, which nothing else is connected to.
fn nics() -> Vec<String> {
    let mut arguments = Vec::new();
    for (number, model) in (1..).zip(NICS) {
        for (end, model) in (1..).zip([model, "virtio-net-pci"]) {
            let id = format!("n{number}e{end}");
            arguments.extend(["-netdev".to_owned(), format!("hubport,id={id},hubid={number}")]);
            let mac = format!("52:54:00:00:{number:02x}:{end:02x}");
            // Without a boot ROM, which would need a file of qemu's.
            let device = format!("{model},netdev={id},mac={mac},romfile=");
            arguments.extend(["-device".to_owned(), device]);
        }
    }
    arguments
}

/// Waits until the machine is off; returns whether it was off before the limit.
fn wait(child: &mut Child, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        thread::sleep(INTERVAL);
    }
    false
}

/// The kernel's command line. The kernel passes unknown parameters to the first process as its
/// environment.
fn kernel_arguments(only: &[String]) -> String {
    let mut arguments = vec![
        "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check".to_owned(),
        format!("PATH={PROGRAMS}"),
        format!("LB_AGENT={PROGRAMS}/lb-agent"),
        format!("LB_ECHO={PROGRAMS}/lb-echo"),
        format!("LB_OBJECT={OBJECT}"),
        format!("LB_PATIENCE={PATIENCE}"),
    ];
    arguments.push(format!("LB_VM_ONLY={}", only.join(",")));
    arguments.join(" ")
}
