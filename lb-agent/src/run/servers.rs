//! Starts the HTTP servers of `run`, which retry if their address is in use.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, Source},
    events::{Notice, tell_failure},
    health::{
        self, Health,
        server::{BindError, Server},
    },
    metrics::Metrics,
    watch::api,
};

/// Publishes an Event on the Node: a server cannot start, and the agent exits.
pub(super) async fn publish_failure(config: &Config, error: &BindError) {
    let Source::Api(options) = &config.source else { return };
    let notice = match error.server() {
        Server::Health => Notice::FailedToStartProxierHealthcheck,
        Server::Metrics => Notice::FailedToStartMetricServer,
    };
    let Ok(connection) = api::connect(options).await else { return };
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let note = format!("{error}: {source}");
    tell_failure(connection.client, &config.node_name, notice, note).await;
}

/// Starts the servers that have an address.
///
/// # Errors
/// [`BindError`] if an address cannot be bound and `--bind-address-hard-fail` is set.
pub(super) async fn start(
    config: &Config,
    health: &Health,
    metrics: &Metrics,
    cancel: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<(), BindError> {
    let servers = [(Server::Health, config.healthz), (Server::Metrics, config.metrics)];
    for (server, address) in servers {
        let Some(address) = address.0 else { continue };
        let bound = if config.bind_hard_fail {
            Some(health::server::bind(server, address).await?)
        } else {
            None
        };
        let (health, metrics, cancel) = (health.clone(), metrics.clone(), cancel.clone());
        let configz = config.kube_proxy.to_configz();
        tasks.spawn(async move {
            let listener = match bound {
                Some(listener) => Some(listener),
                None => health::server::bind_retrying(server, address, &cancel).await,
            };
            let Some(listener) = listener else { return };
            match server {
                Server::Health => {
                    health::server::serve_health(listener, health, metrics, cancel).await
                }
                Server::Metrics => {
                    health::server::serve_metrics(listener, metrics, configz, cancel).await
                }
            }
        });
    }
    Ok(())
}
