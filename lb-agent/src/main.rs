//! lb-agent: parses the command line, sets up logging and dispatches.

use std::{io::IsTerminal as _, path::Path, process::ExitCode, time::Duration};

use anyhow::Context as _;
use lb_agent::{
    cli::{self, CheckArgs, Command, RunArgs},
    commands::{
        check::{self, Check, Severity},
        cleanup,
        drain::{Outcome, drain},
        explain::explain,
        get,
    },
    config::Config,
    conntrack::sysctls,
    run::{process, stop_signal},
    takeover,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lb-agent: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes in one line. It leaves out causes that an earlier one contains,
/// and the excerpts that parsers print below their first line.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        let cause = cause.lines().next().unwrap_or_default();
        if text.is_empty() {
            text = cause.to_owned();
        } else if !text.contains(cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(arguments) => run(*arguments),
        Command::Version => {
            println!(
                "lb-agent {} (maps v{})",
                env!("CARGO_PKG_VERSION"),
                lb_common::abi::ABI_VERSION
            );
            Ok(())
        }
        Command::Get(arguments) => {
            println!("{}", get::get(&arguments)?.trim_end());
            Ok(())
        }
        Command::Check(arguments) => check(arguments),
        Command::Cleanup(arguments) => {
            log_to_stderr(arguments.log.verbosity.unwrap_or_default());
            if arguments.kube_proxy {
                return remove_kube_proxy();
            }
            if let Some(limit) = arguments.drain {
                drain_flows(&arguments.pins.bpf_dir, limit)?;
            }
            cleanup(&arguments.pins.bpf_dir)
        }
        Command::Explain(arguments) => {
            println!("{}", explain(&arguments)?);
            Ok(())
        }
    }
}

/// Returns once the datapath may be removed: all flows have ended, or `limit` is over.
fn drain_flows(bpf_dir: &Path, limit: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime
        .block_on(async { Ok::<_, anyhow::Error>(drain(bpf_dir, limit, stop_signal()?).await?) });
    match outcome? {
        Outcome::Nothing => println!("nothing to drain"),
        Outcome::Finished(0) => println!("drained: no flow is left"),
        Outcome::Finished(flows) => {
            println!("drain timed out after {limit:?}: {flows} flows are cut off");
        }
        Outcome::Stopped(flows) => anyhow::bail!(
            "interrupted: {flows} flows continue and new flows are left to the network stack; \
             `lb-agent cleanup --drain` continues the drain, `lb-agent cleanup` cuts the flows \
             off, `lb-agent run` serves new flows again"
        ),
    }
    Ok(())
}

fn remove_kube_proxy() -> anyhow::Result<()> {
    let takeover::Survey { leftovers, errors } = takeover::remove()?;
    for leftover in &leftovers {
        println!("removed {leftover}");
    }
    if leftovers.is_empty() && errors.is_empty() {
        println!("no kube-proxy rules found");
    }
    match errors.into_iter().map(|error| error.to_string()).collect::<Vec<_>>() {
        errors if errors.is_empty() => Ok(()),
        errors => anyhow::bail!(errors.join("; ")),
    }
}

fn check(arguments: CheckArgs) -> anyhow::Result<()> {
    log_to_stderr(arguments.log.verbosity.unwrap_or_default());
    let options = Check {
        bpf_dir: arguments.pins.bpf_dir,
        cgroup: arguments.cgroup.cgroup,
        devices: arguments.devices,
        xdp: arguments.xdp,
    };
    let findings = check::check(&options);
    for finding in &findings {
        println!("{finding}");
    }
    let fatal = findings.iter().filter(|finding| finding.severity == Severity::Fatal).count();
    anyhow::ensure!(fatal == 0, "run would fail: fix the findings marked `fail` above ({fatal})");
    Ok(())
}

fn log_to_stderr(verbosity: u32) {
    let level = match verbosity {
        // The watch logs errors of the Kubernetes client with their context. A directory that is
        // replaced loses its inotify watch, which notify reports as a warning.
        0..=3 => "info,kube_client=off,kube_runtime=off,notify=error",
        4 | 5 => "debug",
        6.. => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// `run`, or what its flags request instead.
fn run(arguments: RunArgs) -> anyhow::Result<()> {
    let config = Config::load(arguments.clone())?;
    log_to_stderr(config.verbosity());
    if let Some(file) = &arguments.write_config_to {
        config.kube_proxy.write(file)?;
        tracing::info!(file = %file.display(), "configuration written");
        return Ok(());
    }
    if arguments.cleanup {
        return cleanup(&arguments.pins.bpf_dir);
    }
    warn_without_effect(&config, &arguments);
    if arguments.init_only {
        sysctls::apply(&config.kube_proxy.conntrack);
        return Ok(());
    }
    process::adjust_oom_score(&config.kube_proxy);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(lb_agent::run::run(config));
    // Name resolution and a sweep run in threads that cannot be cancelled.
    runtime.shutdown_background();
    result
}

/// Warns of flags and fields that are set and that lb ignores.
fn warn_without_effect(config: &Config, arguments: &RunArgs) {
    let flags = arguments.kube_proxy.without_effect();
    if !flags.is_empty() {
        let flags: Vec<_> = flags.iter().map(|flag| format!("--{flag}")).collect();
        tracing::warn!(flags = flags.join(" "), "these flags of kube-proxy have no effect here");
    }
    let fields = config.kube_proxy.without_effect(&arguments.kube_proxy);
    if !fields.is_empty() {
        let fields = fields.join(" ");
        tracing::warn!(fields, "these fields of --config have no effect here");
    }
}

fn cleanup(bpf_dir: &Path) -> anyhow::Result<()> {
    let cleanup::Cleaned { links, filters, pins } = cleanup::cleanup(bpf_dir)?;
    takeover::remove_keepers()?;
    println!("detached {links} links and {filters} filters, removed {pins} pins");
    Ok(())
}
