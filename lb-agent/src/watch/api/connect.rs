//! The connection to the API servers that the watch and the Events share.

use std::sync::Arc;

use axum::http::{Request, Uri};
use kube::{
    Client,
    client::{Body, ClientBuilder},
};
use tower::util::service_fn;

use super::{
    access::{Access, ConnectError, Options},
    floor::Floor,
    learned::Learned,
    liveness::{Liveness, Proofs},
    servers::{Requests, Servers},
};

/// A client of whichever server serves.
#[derive(Clone)]
pub struct Connection {
    /// The client. Every request goes to the server that serves now.
    pub client: Client,
    servers: Option<Arc<Servers>>,
    liveness: Liveness,
    learned: Learned,
    floor: Floor,
}

impl Connection {
    /// The connection of a ready client, to one server.
    pub fn new(client: Client) -> Self {
        let requests = Requests::new(service_fn(move |request| {
            let client = client.clone();
            async move { Ok(client.send(request).await?) }
        }));
        Self::over(requests, None, Learned::default())
    }

    fn over(requests: Requests, servers: Option<Arc<Servers>>, learned: Learned) -> Self {
        let (liveness, floor) = (Liveness::default(), Floor::default());
        let raise = floor.clone();
        let raised = tower::util::MapRequest::new(requests, move |mut request: Request<Body>| {
            if let Some(uri) = raise.raised(request.uri()) {
                *request.uri_mut() = uri;
            }
            request
        });
        let client =
            ClientBuilder::new(raised, "default").with_layer(&Proofs(liveness.clone())).build();
        Self { client, servers, liveness, learned, floor }
    }

    /// The server that serves, or the configured ones if none does.
    pub fn server(&self) -> String {
        self.servers.as_ref().map(|servers| servers.described()).unwrap_or_default()
    }

    /// The servers that are configured.
    pub fn configured(&self) -> Vec<Uri> {
        self.servers.as_ref().map(|servers| servers.given()).unwrap_or_default()
    }

    /// Which watches are broken.
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// The versions that were seen.
    pub(super) fn floor(&self) -> &Floor {
        &self.floor
    }

    /// What is known of the API servers.
    pub fn learned(&self) -> &Learned {
        &self.learned
    }

    /// What to try when no server is reachable.
    pub fn advice(&self) -> Option<&'static str> {
        self.servers.as_ref().and_then(|servers| servers.advice())
    }
}

/// Makes a client, without contacting a server.
///
/// # Errors
/// If the configuration is missing or wrong, with the remedy.
pub async fn connect(options: &Options) -> Result<Connection, ConnectError> {
    let access = Access::read(options).await?;
    let learned = Learned::open(options.state_dir.as_deref());
    let servers = Arc::new(Servers::new(options.clone(), access, learned.clone())?);
    Ok(Connection::over(Servers::service(&servers), Some(servers), learned))
}
