//! The objects of a large cluster, created in a real API server by direct requests in parallel.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use lb_agent::watch::api;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::objects::{NAMESPACES, Size, created, namespace, service};
use crate::harness::netns::topology::namespace::Netns;

/// Requests at once.
const WORKERS: usize = 32;
/// How long all of them may take.
const LIMIT: Duration = Duration::from_secs(600);

/// A runtime whose threads are in the calling thread's network namespace.
///
/// # Errors
/// Threads cannot be started.
pub fn runtime() -> Result<Runtime> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("cannot start the threads of the runtime")
}

/// Creates Services and their slices, from within a namespace, with the rights of a kubeconfig.
/// Returns how long it took.
///
/// # Errors
/// The API server refuses one, or it takes ten minutes.
pub fn all(netns: &Netns, kubeconfig: &Path, size: Size) -> Result<Duration> {
    let start = Instant::now();
    netns.run(|| {
        runtime()?.block_on(async {
            let creating = create(client(kubeconfig).await?, size);
            timeout(LIMIT, creating).await.context("the objects were not created in time")?
        })
    })?;
    Ok(start.elapsed())
}

/// Replaces the endpoints of a Service one by one, each by a request of its own, as in the rollout
/// of a Deployment.
///
/// # Errors
/// The API server refuses one.
pub fn roll_out(netns: &Netns, kubeconfig: &Path, size: Size, of: u32) -> Result<()> {
    netns.run(|| {
        runtime()?.block_on(async {
            let client = client(kubeconfig).await?;
            let slices = Api::<EndpointSlice>::namespaced(client, &namespace(of));
            let slice = size.slice(of, true);
            let name = slice["metadata"]["name"].as_str().context("a slice without a name")?;
            for number in 0..size.endpoints {
                let endpoints = &size.slice_replaced(of, number)["endpoints"];
                let patch = Patch::Merge(json!({"endpoints": endpoints}));
                slices.patch(name, &PatchParams::default(), &patch).await?;
            }
            Ok(())
        })
    })
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let options = api::Options { kubeconfig: Some(kubeconfig.to_owned()), ..Default::default() };
    Ok(api::connect(&options).await?.client)
}

async fn create(client: Client, size: Size) -> Result<()> {
    let namespaces = Api::<Namespace>::all(client.clone());
    for number in 0..NAMESPACES.min(size.services) {
        let object = json!({"metadata": {"name": namespace(number)}});
        namespaces.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    }
    let next = Arc::new(AtomicU32::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        workers.spawn(create_some(client.clone(), size, Arc::clone(&next)));
    }
    while let Some(done) = workers.join_next().await {
        done??;
    }
    Ok(())
}

/// Creates the Services that no other worker has begun with.
async fn create_some(client: Client, size: Size, next: Arc<AtomicU32>) -> Result<()> {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= size.services {
            return Ok(());
        }
        let create = PostParams::default();
        let of = namespace(number);
        let object: Service = object(service(number))?;
        Api::namespaced(client.clone(), &of).create(&create, &object).await?;
        let object: EndpointSlice = self::object(size.slice(number, true))?;
        Api::namespaced(client.clone(), &of).create(&create, &object).await?;
    }
}

fn object<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    Ok(serde_json::from_value(created(value))?)
}
