//! lb-agent: parses the command line, sets up logging and dispatches.

#![cfg_attr(not(test), deny(clippy::print_stdout))]

use std::{
    ffi::OsString,
    io::{BufWriter, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use lb_agent::{
    cli::{self, CheckArgs, Command, RunArgs, environment},
    commands::{
        bench,
        check::{self, Check, Severity},
        cleanup, documents,
        drain::{Outcome, drain},
        explain::explain,
        get, ready, status, sysdump,
    },
    config::Config,
    logs::{self, Format},
    output::{self, line},
    run::{prepare, process, stop_signal},
    takeover,
};

/// How many bytes of rows are written at once.
const OUTPUT: usize = 64 * 1024;

pub(crate) fn main() -> ExitCode {
    if let Err(error) = put_in_node_name() {
        eprintln!("lb-agent: {}", one_line(&error));
        return ExitCode::FAILURE;
    }
    let cli = cli::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lb-agent: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Starts this program again in this process if the environment twin of a flag asks for the name
/// of the node, with that name in its value. Returns if none does.
fn put_in_node_name() -> anyhow::Result<()> {
    let texts = |(name, value): (OsString, OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    let changed = environment::expanded(std::env::vars_os().filter_map(texts))?;
    if changed.is_empty() {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let mut again = std::process::Command::new("/proc/self/exe");
    let error = again.arg0(name).args(arguments).envs(changed).exec();
    Err(error).context("cannot start again with the node's name in the environment")
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
            let (version, maps) = (env!("CARGO_PKG_VERSION"), lb_common::abi::ABI_VERSION);
            Ok(line(format_args!("lb-agent {version} (maps v{maps})"))?)
        }
        Command::Get(arguments) => {
            let mut out = BufWriter::with_capacity(OUTPUT, output::stdout());
            get::get(&arguments, &mut out)?;
            Ok(out.flush()?)
        }
        Command::Check(arguments) => check(arguments),
        Command::Cleanup(arguments) => {
            logs::start(Format::Text, arguments.log.verbosity.unwrap_or_default());
            if arguments.kube_proxy {
                return remove_kube_proxy(arguments.chroot.as_deref());
            }
            if let Some(limit) = arguments.drain {
                drain_flows(&arguments.pins.bpf_dir, limit)?;
            }
            cleanup(&arguments.pins.bpf_dir, arguments.force)
        }
        Command::Bench(arguments) => Ok(line(bench::bench(&arguments)?)?),
        Command::Explain(arguments) => Ok(line(explain(&arguments)?)?),
        Command::Status(arguments) => {
            if let Some(file) = &arguments.ready_file {
                return Ok(line(ready::ready(file)?.trim_end())?);
            }
            let status = status::wait(&arguments.pins.bpf_dir, arguments.wait);
            line(status.render(arguments.output)?.trim_end())?;
            anyhow::ensure!(status.well, "this node is not well: {}", status.problems.join("; "));
            Ok(())
        }
        Command::Sysdump(arguments) => {
            if let Some(path) = sysdump::sysdump(&arguments)? {
                line(path.display())?;
            }
            Ok(())
        }
        Command::Completions(arguments) => {
            let text = documents::completions(arguments.shell);
            Ok(output::stdout().write_all(&text)?)
        }
        Command::Documents(arguments) => documents::write(&arguments.prefix)
            .with_context(|| format!("cannot write below {}", arguments.prefix.display())),
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
        Outcome::Nothing => line("nothing to drain")?,
        Outcome::Finished(0) => line("drained: no flow is left")?,
        Outcome::Finished(flows) => {
            line(format_args!("drain timed out after {limit:?}: {flows} flows are cut off"))?;
        }
        Outcome::Stopped(flows) => anyhow::bail!(
            "interrupted: {flows} flows continue and new flows are left to the network stack; \
             `lb-agent cleanup --drain` continues the drain, `lb-agent cleanup` cuts the flows \
             off, `lb-agent run` serves new flows again"
        ),
    }
    Ok(())
}

fn remove_kube_proxy(root: Option<&Path>) -> anyhow::Result<()> {
    if let Some(root) = root {
        nix::unistd::chroot(root)
            .and_then(|()| nix::unistd::chdir("/"))
            .with_context(|| format!("cannot change the root to {} (--chroot)", root.display()))?;
    }
    let takeover::Survey { leftovers, errors } = takeover::remove()?;
    for leftover in &leftovers {
        line(format_args!("removed {leftover}"))?;
    }
    if leftovers.is_empty() && errors.is_empty() {
        line("no kube-proxy rules found")?;
    }
    match errors.into_iter().map(|error| error.to_string()).collect::<Vec<_>>() {
        errors if errors.is_empty() => Ok(()),
        errors => anyhow::bail!(errors.join("; ")),
    }
}

fn check(arguments: CheckArgs) -> anyhow::Result<()> {
    logs::start(Format::Text, arguments.log.verbosity.unwrap_or_default());
    let findings = check::check(&Check::of(&arguments));
    for finding in &findings {
        line(finding)?;
    }
    let fatal = findings.iter().filter(|finding| finding.severity == Severity::Fatal).count();
    anyhow::ensure!(fatal == 0, "run would fail: fix the findings marked `fail` above ({fatal})");
    Ok(())
}

/// `run`, or what its flags request instead.
fn run(arguments: RunArgs) -> anyhow::Result<()> {
    let config = Config::load(arguments.clone())?;
    let last_lines = logs::start(config.log_format(), config.verbosity());
    if let Some(file) = &arguments.write_config_to {
        config.kube_proxy.write(file)?;
        tracing::info!(file = %file.display(), "configuration written");
        return Ok(());
    }
    if arguments.cleanup {
        return cleanup(&arguments.pins.bpf_dir, false);
    }
    warn_without_effect(&config, &arguments);
    if arguments.init_only {
        return Ok(prepare::prepare(&config)?);
    }
    process::end_on_panic();
    process::adjust_oom_score(&config.kube_proxy);
    lb_sys::keep_heap_small();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(lb_agent::run::run(config, last_lines));
    // Name resolution and a sweep run in threads that cannot be cancelled.
    runtime.shutdown_background();
    result
}

/// Warns of flags, fields and variables that are set and that lb ignores.
fn warn_without_effect(config: &Config, arguments: &RunArgs) {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let unknown = environment::unknown(names);
    if !unknown.is_empty() {
        let variables = unknown.into_iter().collect::<Vec<_>>().join(" ");
        tracing::warn!(
            variables,
            "no flag has these names, so they have no effect: correct them in the environment, or \
             in the ConfigMap that it comes from"
        );
    }
    let flags = arguments.kube_proxy.without_effect();
    if !flags.is_empty() {
        let flags: Vec<_> = flags.iter().map(|flag| format!("--{flag}")).collect();
        tracing::warn!(flags = flags.join(" "), "these flags of kube-proxy have no effect here");
    }
    let unknown = config.kube_proxy.unknown();
    if !unknown.is_empty() {
        let fields = unknown.join(" ");
        tracing::warn!(fields, "unknown fields in --config are ignored: correct or remove them");
    }
    let fields = config.kube_proxy.without_effect(&arguments.kube_proxy);
    if !fields.is_empty() {
        let fields = fields.join(" ");
        tracing::warn!(fields, "these fields of --config have no effect here");
    }
}

fn cleanup(bpf_dir: &Path, force: bool) -> anyhow::Result<()> {
    let cleanup::Cleaned { links, filters, pins } = cleanup::cleanup(bpf_dir, force)?;
    takeover::remove_keepers()?;
    Ok(line(format_args!("detached {links} links and {filters} filters, removed {pins} pins"))?)
}
