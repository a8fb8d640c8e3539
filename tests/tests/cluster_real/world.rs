//! The one cluster of all tests, and the namespace of the test that runs.

use std::env;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::plan::{Addresses, Family};
use lb_tests::harness::real::cni::Cni;
use lb_tests::harness::real::objects::list;
use lb_tests::harness::real::plan::{NODES, Plan, node_name};
use lb_tests::harness::real::{self, Cluster, Options, Proxy};
use lb_tests::harness::wait::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The name of the tests' cluster; another one may be up at the same time.
const NAME: &str = "lb-cluster-tests";

/// The variable that names another network of pods than the default one.
const CNI: &str = "LB_TESTS_CNI";

/// The label of the agents' pods, as a selector.
pub(crate) const AGENTS: &str = "app.kubernetes.io/name=lb-agent";

/// How long kubectl waits for pods.
const TIMEOUT: &str = "--timeout=120s";

/// The cluster that is up, with who served Services at first, or why it did not come up.
static WORLD: Mutex<Option<(Proxy, Result<&'static World, String>)>> = Mutex::new(None);

/// The cluster, and what tests need beside it.
pub(crate) struct World {
    cluster: Mutex<Cluster>,
    /// A copy that tests use while the other one is asked what is wrong.
    pub(crate) real: Cluster,
    logs: TempDir,
    /// How many tests were begun.
    tests: AtomicUsize,
}

impl World {
    /// The cluster in which `proxy` serves at first, made in the place of any other if it is not
    /// there yet.
    pub(crate) fn get(proxy: Proxy) -> Result<&'static Self> {
        let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match &mut *world {
            Some((which, outcome)) if *which == proxy => outcome,
            _ => {
                let made = Self::create(proxy).map_err(|error| format!("{error:#}"));
                let made = made.map(|made| &*Box::leak(Box::new(made)));
                &mut world.insert((proxy, made)).1
            }
        };
        outcome.clone().map_err(|error| anyhow!("{error}"))
    }

    fn create(proxy: Proxy) -> Result<Self> {
        let plan = Plan::new(NAME)?;
        real::down(&plan)?;
        let cni = match env::var(CNI) {
            Ok(name) => Cni::from_str(&name, false).map_err(|error| anyhow!("{CNI}: {error}"))?,
            Err(_) => Cni::default(),
        };
        let options = Options { cni, proxy };
        let cluster = real::up(&plan, &options, &|line| println!("{line}"))?;
        let real = Cluster::open(&plan)?;
        let (cluster, logs) = (Mutex::new(cluster), tempfile::tempdir()?);
        Ok(Self { cluster, real, logs, tests: AtomicUsize::new(0) })
    }

    /// Runs a test in a namespace of its own; an error shows the cluster. The namespace ends while
    /// the next test runs in another one: it takes the API server six seconds, and the pods are
    /// gone before.
    pub(crate) fn run(&self, test: fn(&Self) -> Result<()>) -> Result<()> {
        self.tests.fetch_add(1, Ordering::Relaxed);
        let kubectl = self.real.kubectl();
        let namespace = self.namespace();
        kubectl.run(&["create", "namespace", &namespace])?;
        let outcome = test(self).map_err(|error| {
            let mut cluster = self.cluster.lock().unwrap_or_else(PoisonError::into_inner);
            anyhow!("{error:#}\n{}", cluster.describe())
        });
        kubectl.run(&["delete", "namespace", &namespace, "--wait=false"])?;
        let pods = ["delete", "pods", "--all", "--grace-period=1", TIMEOUT, "-n", &namespace];
        kubectl.run(&pods)?;
        outcome
    }

    /// The namespace of the test's objects.
    pub(crate) fn namespace(&self) -> String {
        format!("test-{}", self.tests.load(Ordering::Relaxed))
    }

    /// Runs kubectl in the test's namespace.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.real.kubectl().run(&[&["-n", &*self.namespace()], arguments].concat())
    }

    /// An object of the test's namespace.
    pub(crate) fn get_object(&self, arguments: &[&str]) -> Result<Value> {
        self.real.kubectl().get(&[&["-n", &*self.namespace()], arguments].concat())
    }

    /// Creates or changes objects, and waits until every pod of their workloads is ready.
    pub(crate) fn apply(&self, objects: &[Value]) -> Result<()> {
        let arguments = ["-n", &*self.namespace(), "apply", "-f", "-"];
        self.real.kubectl().run_with(&arguments, &list(objects))?;
        for object in objects {
            let kind = object["kind"].as_str().unwrap_or_default();
            if ["Deployment", "StatefulSet"].contains(&kind) {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                self.roll_out(&format!("{kind}/{name}"))?;
            }
        }
        Ok(())
    }

    /// Waits until a workload of the test's namespace is as it should be.
    pub(crate) fn roll_out(&self, what: &str) -> Result<()> {
        self.kubectl(&["rollout", "status", what, TIMEOUT]).map(drop)
    }

    /// Waits until lb's DaemonSet is as it should be.
    pub(crate) fn roll_out_agents(&self) -> Result<()> {
        let arguments =
            ["-n", "kube-system", "rollout", "status", "daemonset/lb-agent", "--timeout=180s"];
        self.real.kubectl().run(&arguments).map(drop)
    }

    /// The names of an app's pods that do not terminate, sorted.
    pub(crate) fn pods(&self, app: &str) -> Result<Vec<String>> {
        let pods = self.get_object(&["pods", "-l", &format!("app={app}")])?;
        let pods = pods["items"].as_array().into_iter().flatten();
        let live = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let mut names: Vec<String> =
            live.filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_owned())).collect();
        names.sort();
        Ok(names)
    }

    /// The one pod of an app.
    pub(crate) fn only_pod(&self, app: &str) -> Result<String> {
        match &*self.pods(app)? {
            [pod] => Ok(pod.clone()),
            pods => bail!("{app} has not one pod but {pods:?}"),
        }
    }

    /// A pod of the test's namespace as a place for clients.
    pub(crate) fn pod(&self, name: &str) -> Result<Host> {
        self.real.host_of_pod(&self.namespace(), name, self.logs.path())
    }

    /// The only pod of an app as a place for clients.
    pub(crate) fn client(&self, app: &str) -> Result<Host> {
        self.pod(&self.only_pod(app)?)
    }

    /// A node as a place for clients.
    pub(crate) fn node(&self, number: u8) -> Result<Host> {
        self.real.host_of_node(number, self.logs.path())
    }

    /// The client outside.
    pub(crate) fn outside(&self) -> Result<Host> {
        self.real.host_outside(self.logs.path())
    }

    /// The ClusterIPs of a Service of the test's namespace.
    pub(crate) fn cluster_ips(&self, service: &str) -> Result<Addresses> {
        let object = self.get_object(&["service", service])?;
        let ips = object["spec"]["clusterIPs"].as_array().into_iter().flatten();
        let ips: Vec<&str> = ips.filter_map(Value::as_str).collect();
        let v4 = ips.iter().find_map(|ip| ip.parse().ok());
        let v6 = ips.iter().find_map(|ip| ip.parse().ok());
        let missing = || format!("{service} has not an address of each family: {ips:?}");
        Ok(Addresses { v4: v4.with_context(missing)?, v6: v6.with_context(missing)? })
    }

    /// The node port of a named port of a Service.
    pub(crate) fn node_port(&self, service: &str, port: &str) -> Result<u16> {
        let object = self.get_object(&["service", service])?;
        let mut ports = object["spec"]["ports"].as_array().into_iter().flatten();
        let found = ports.find(|found| found["name"] == port);
        let number = found.and_then(|found| found["nodePort"].as_u64());
        Ok(u16::try_from(number.with_context(|| format!("{service} has no node port {port}"))?)?)
    }

    /// Waits until the maps of every node have so many ready endpoints for each port and family
    /// of a Service.
    pub(crate) fn wait_endpoints(&self, service: &str, ready: u64) -> Result<()> {
        self.wait_rows(service, &format!("{ready} ready endpoints"), |row| row["ready"] == ready)
    }

    /// Waits until every row of a Service, in the maps of every node, is as it should be.
    pub(crate) fn wait_rows(
        &self,
        service: &str,
        wanted: &str,
        is_right: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let name = format!("{}/{service}", self.namespace());
        for node in self.real.nodes() {
            eventually(|| {
                let rows: Value =
                    serde_json::from_str(&node.lb_agent(&["get", "services", "-o", "json"])?)?;
                let rows = rows.as_array().into_iter().flatten().filter(|row| {
                    let full = row["name"].as_str().unwrap_or_default();
                    full.split(':').next() == Some(&*name)
                });
                let rows: Vec<_> = rows.collect();
                ensure!(
                    !rows.is_empty() && rows.iter().all(|row| is_right(row)),
                    "{name} on {}: not {wanted} but {rows:?}",
                    node.name()
                );
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Gives a Service of type LoadBalancer addresses as a cloud's controller does, and waits for
    /// every node.
    pub(crate) fn set_ingress(&self, service: &str, addresses: Addresses) -> Result<()> {
        let ips = Family::ALL.map(|family| json!({"ip": addresses.get(family)}));
        let status = json!({"status": {"loadBalancer": {"ingress": ips}}}).to_string();
        let patch =
            ["patch", "service", service, "--subresource=status", "--type=merge", "-p", &status];
        self.kubectl(&patch)?;
        self.wait_rows(service, "a frontend of the load balancer", |row| {
            let frontends = row["frontends"].to_string();
            Family::ALL.iter().any(|family| frontends.contains(&addresses.get(*family).to_string()))
        })
    }

    /// Has the client outside send what is for these addresses to a node, as a router would.
    pub(crate) fn route_outside(&self, addresses: Addresses, node: u8) -> Result<()> {
        let to = real::plan::node(node);
        for family in Family::ALL {
            let (address, via) = (addresses.get(family), to.get(family));
            self.real.outside().ip(&format!("route replace {address} via {via}"))?;
        }
        Ok(())
    }
}

/// Numbers of all nodes.
pub(crate) fn nodes() -> impl Iterator<Item = u8> {
    1..=NODES
}

/// Runs `kubectl` for a node.
pub(crate) fn of_node(world: &World, before: &[&str], node: u8, after: &[&str]) -> Result<()> {
    let name = node_name(node);
    world.real.kubectl().run(&[before, &[&*name], after].concat()).map(drop)
}

/// Removes the cluster if a test has made it.
pub(crate) fn remove() -> Result<()> {
    let world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    if world.is_some() {
        real::down(&Plan::new(NAME)?)?;
    }
    Ok(())
}
