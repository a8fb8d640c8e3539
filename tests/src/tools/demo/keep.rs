//! `--keep`: a background process keeps the nodes, pods and agents running until it is ended.
//!
//! Namespaces, servers and agents belong to that process and end with it.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use nix::sys::signal::kill;
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid, write};

use super::report::Report;
use super::scene::{CLIENT, HTTP_PORT, Number};
use super::stop::Stop;
use crate::harness::netns::actors::agent::lb_agent;
use crate::harness::netns::topology::plan::{balancer_ip, cluster_ip};
use crate::harness::netns::words::scenario::Scenario;

/// The flag of the background process.
pub const HOLD: &str = "--hold";

/// Runs the demo in a background process with a session of its own, and returns when the demo
/// has been shown. The process keeps running, unless the demo failed or was interrupted.
///
/// # Errors
/// The process cannot be started.
pub fn in_background() -> Result<ExitCode> {
    let own = std::env::current_exe().context("cannot find the running program")?;
    let mut command = Command::new(own);
    command.arg(HOLD);
    // SAFETY: between fork and exec this makes a system call only.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            Ok(())
        });
    }
    let (mut end, done) = std::io::pipe().context("cannot make a pipe")?;
    // The background process writes the demo's exit status here when all is shown.
    command.stdin(done);
    let stop = Stop::listen()?;
    let mut child = command.spawn().context("cannot start the demo in the background")?;
    drop(command);
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let mut passed_on = false;
    let mut demo_status = [0];
    let is_detached = loop {
        if let (Some(signal), false) = (stop.signal(), passed_on) {
            passed_on = kill(pid, signal).is_ok();
        }
        match end.read(&mut demo_status) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot wait for the demo"),
            Ok(length) => break length > 0,
        }
    };
    if is_detached {
        return Ok(ExitCode::from(demo_status[0]));
    }
    let status = child.wait().context("cannot wait for the demo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Passes the exit status to the waiting process, and closes the terminal.
///
/// # Errors
/// There is no /dev/null, or no process waits.
pub fn detach(status: u8) -> Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.context("cannot open /dev/null")?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    write(std::io::stdin(), &[status]).context("the process that waits for the demo is gone")?;
    dup2_stdin(&null)?;
    Ok(())
}

/// Prints how to look around.
///
/// # Errors
/// The agent's program is not there.
pub fn explain(world: &Scenario, report: &mut Report) -> Result<()> {
    let cluster = &world.cluster;
    let node = cluster.node(1);
    let enter = |name: &str| format!("nsenter --net=/run/netns/{}-{name}", cluster.prefix());
    let agent = lb_agent()?.get_program().to_string_lossy().into_owned();
    let bpf_dir = node.bpf_dir().display();
    let web = cluster_ip(Number::Web as u8);
    let balancer = balancer_ip(Number::Web as u8);
    let pods = ["pod-client", "pod-near", "pod-far"];
    let lines = [
        String::new(),
        "Nodes, pods and agents keep running. Network namespaces (see `ip netns`):".to_owned(),
        format!("  {}-{{node1,node2,{},fabric,outside}}", cluster.prefix(), pods.join(",")),
        format!(
            "Call `web` from pod `{CLIENT}` (packet by packet: curl is not in the pod's cgroup):"
        ),
        format!("  {} curl -s http://{}:{HTTP_PORT}", enter("pod-client"), web.v4),
        format!("  {} curl -s 'http://[{}]:{HTTP_PORT}'", enter("pod-client"), web.v6),
        "Call it from outside, at its load balancer's address:".to_owned(),
        format!("  {} curl -s http://{}:{HTTP_PORT}", enter("outside"), balancer.v4),
        format!("  {} curl -s 'http://[{}]:{HTTP_PORT}'", enter("outside"), balancer.v6),
        "Show node1's maps (`get services|frontends|backends|flows|affinity|counters`):".to_owned(),
        format!("  {agent} get flows --bpf-dir {bpf_dir}"),
        format!("  bpftool map dump pinned {bpf_dir}/maps/FRONTENDS4@1"),
        "Ask node1's agent for health and metrics:".to_owned(),
        format!("  {} curl -s http://127.0.0.1:10256/healthz", enter("node1")),
        format!("  {} curl -s http://127.0.0.1:10249/metrics", enter("node1")),
        "Edit the Services and EndpointSlices; a saved file takes effect at once:".to_owned(),
        format!("  ls {}", world.manifests.path().display()),
        "Open a shell in the pod's network namespace:".to_owned(),
        format!("  {} bash", enter("pod-client")),
        "Stop and remove everything:".to_owned(),
        format!("  kill {}", std::process::id()),
    ];
    report.line(&lines.join("\n"));
    Ok(())
}
