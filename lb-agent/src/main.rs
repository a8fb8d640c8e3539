//! lb-agent: parses the command line, sets up logging and dispatches.

use std::{io::IsTerminal as _, process::ExitCode};

use anyhow::Context as _;
use lb_agent::{
    cli::{self, Command, LogArgs, RunArgs},
    config::{Config, Source},
    events::Refusals,
    health::{self, Health, server::Server},
    metrics::Metrics,
    watch::{api, manifests},
};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lb-agent: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, without those that an error before names already.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(arguments) => {
            log_to_stderr(&arguments.log);
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .context("cannot start the runtime")?
                .block_on(run(*arguments))
        }
        Command::Version => {
            println!(
                "lb-agent {} (maps v{})",
                env!("CARGO_PKG_VERSION"),
                lb_common::abi::ABI_VERSION
            );
            Ok(())
        }
        Command::Check(_) | Command::Get(_) | Command::Explain(_) | Command::Cleanup(_) => {
            anyhow::bail!("this command is not there yet")
        }
    }
}

fn log_to_stderr(log: &LogArgs) {
    let level = match log.verbosity {
        0..=3 => "info",
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

async fn run(arguments: RunArgs) -> anyhow::Result<()> {
    for flag in &arguments.without_effect {
        tracing::warn!(flag = format!("--{flag}"), "has no effect yet");
    }
    let config = Config::new(arguments)?;
    let health = Health::new(health::UPDATE_TIMEOUT);
    let metrics = Metrics::new();
    let cancel = CancellationToken::new();
    let tasks = TaskTracker::new();
    start_servers(&config, &health, &metrics, &cancel, &tasks).await?;
    let (sender, mut events) = mpsc::channel(1024);
    let (source, _refusals) = start_source(&config, &metrics, sender).await?;
    let mut source = std::pin::pin!(source);
    let stopped = stop_signal()?;
    let mut stopped = std::pin::pin!(stopped);
    loop {
        tokio::select! {
            result = &mut source => {
                result?;
                break;
            }
            () = &mut stopped => break,
            event = events.recv() => match event {
                Some(event) => tracing::debug!(?event),
                None => break,
            },
        }
    }
    cancel.cancel();
    tasks.close();
    tasks.wait().await;
    Ok(())
}

type SourceTask = std::pin::Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

async fn start_source(
    config: &Config,
    metrics: &Metrics,
    sender: mpsc::Sender<lb_agent::watch::Event>,
) -> anyhow::Result<(SourceTask, Refusals)> {
    match &config.source {
        Source::Manifests(dir) => {
            let problems = manifests::Problems::default();
            metrics.set_problems(problems.clone());
            let dir = dir.clone();
            let task = async move { Ok(manifests::watch(dir, sender, problems).await?) };
            Ok((Box::pin(task), Refusals::logged()))
        }
        Source::Api(options) => {
            let connection = api::connect(options).await?;
            let refusals = Refusals::published(connection.client.clone(), &config.node_name);
            let task = async move {
                api::watch(connection, sender).await;
                Ok(())
            };
            Ok((Box::pin(task), refusals))
        }
    }
}

async fn start_servers(
    config: &Config,
    health: &Health,
    metrics: &Metrics,
    cancel: &CancellationToken,
    tasks: &TaskTracker,
) -> anyhow::Result<()> {
    let servers = [(Server::Health, config.healthz), (Server::Metrics, config.metrics)];
    for (server, address) in servers {
        let Some(address) = address.0 else { continue };
        let bound = if config.bind_hard_fail {
            Some(health::server::bind(server, address).await?)
        } else {
            None
        };
        let (health, metrics, cancel) = (health.clone(), metrics.clone(), cancel.clone());
        tasks.spawn(async move {
            let listener = match bound {
                Some(listener) => Some(listener),
                None => health::server::bind_retrying(server, address, &cancel).await,
            };
            let Some(listener) = listener else { return };
            let served = match server {
                Server::Health => {
                    health::server::serve_health(listener, health, metrics, cancel).await
                }
                Server::Metrics => health::server::serve_metrics(listener, metrics, cancel).await,
            };
            if let Err(error) = served {
                tracing::warn!(%address, %error, "server ended");
            }
        });
    }
    Ok(())
}

fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
