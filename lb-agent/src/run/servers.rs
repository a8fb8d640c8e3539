//! The HTTP servers of `run`, which wait for their address if they must.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, Source},
    events::{Notice, publish_failure},
    health::{
        self, Health,
        server::{BindError, Server},
    },
    metrics::Metrics,
    watch::api,
};

/// Tells on the Node that a server cannot start, which ends the agent.
pub(super) async fn tell(config: &Config, error: &BindError) {
    let Source::Api(options) = &config.source else { return };
    let notice = match error.server() {
        Server::Health => Notice::FailedToStartProxierHealthcheck,
        Server::Metrics => Notice::FailedToStartMetricServer,
    };
    let Ok(connection) = api::connect(options).await else { return };
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let note = format!("{error}: {source}");
    publish_failure(connection.client, &config.node_name, notice, note).await;
}

/// Starts the servers that have an address.
///
/// # Errors
/// An address that cannot be bound, if that is to end the agent.
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
