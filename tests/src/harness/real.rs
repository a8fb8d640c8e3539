//! A real Kubernetes cluster on this machine: three kubelets with containerd and runc, a control
//! plane with every controller, CoreDNS, pods that run, and lb from its image and manifests.
//!
//! ```text
//!   control 172.18.0.2      outside 172.18.0.100
//!         |                       |
//!      [fabric: bridge br0, no uplink]-----------+
//!         |                  |                   |
//!   [node1] 172.18.0.11   [node2] .12         [node3] .13
//!    pods 10.244.1.0/24    10.244.2.0/24       10.244.3.0/24
//! ```
//! Each has an IPv6 address beside it. All of it is in network namespaces `NAME-*`, cgroups `NAME`
//! and the directory [`plan::Plan::directory`], and all of these are found by the name alone. A
//! cluster outlives the process that made it; [`down`] removes it, also what a failed [`up`] or
//! a killed test left.

pub mod addons;
mod cgroups;
pub mod cni;
mod containerd;
pub mod control_plane;
mod daemon;
mod fabric;
mod flannel;
mod hosts;
pub mod images;
pub mod kube_proxy;
pub mod kubectl;
mod kubelet;
pub mod node;
pub mod objects;
pub mod page;
pub mod plan;
pub mod scripts;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::panic;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use cni::Cni;
use daemon::Daemon;
use fabric::Fabric;
use kubectl::Kubectl;
use node::Node;
use objects::list;
use plan::{NODES, Plan};

use crate::harness::netns::topology::namespace::Netns;

/// Who serves Services on the nodes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Proxy {
    /// lb's DaemonSet
    #[default]
    Lb,
    /// kube-proxy's DaemonSet, as kubeadm has it
    KubeProxy,
    /// Nobody: pods that need a Service do not become ready
    None,
}

/// What a cluster is to be like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The network of pods.
    pub cni: Cni,
    /// Who serves Services.
    pub proxy: Proxy,
}

/// A running cluster. Dropping leaves it.
#[derive(Debug)]
pub struct Cluster {
    plan: Plan,
    fabric: Fabric,
    nodes: Vec<Node>,
    kubectl: Kubectl,
    /// What this process started, to see whether it still runs.
    daemons: Vec<Daemon>,
}

impl Cluster {
    /// Finds the cluster that is up.
    ///
    /// # Errors
    /// None of this name is.
    pub fn open(plan: &Plan) -> Result<Self> {
        ensure!(cgroups::is_populated(plan)?, "no cluster {} is up", plan.name());
        let fabric = Fabric::open(plan)?;
        let nodes = (1..=NODES).zip(&fabric.nodes);
        let nodes = nodes.map(|(number, netns)| Node::open(plan, number, netns.clone()));
        let nodes = nodes.collect::<Result<_>>()?;
        let kubectl = Kubectl::new(plan, fabric.control.clone())?;
        Ok(Self { plan: plan.clone(), fabric, nodes, kubectl, daemons: Vec::new() })
    }

    /// Its name, and what follows from it.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// A node; they count from 1.
    ///
    /// # Panics
    /// There is no such node.
    pub fn node(&self, number: u8) -> &Node {
        &self.nodes[usize::from(number) - 1]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Speaks to the API server.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// The namespace of the client outside.
    pub fn outside(&self) -> &Netns {
        &self.fabric.outside
    }

    /// Fails if a daemon that this process started has ended.
    ///
    /// # Errors
    /// One has; with the end of its log.
    pub fn check_running(&mut self) -> Result<()> {
        self.daemons.iter_mut().try_for_each(Daemon::check_running)
    }

    /// The name of an image that the nodes have.
    ///
    /// # Errors
    /// They have none whose name has this text.
    pub fn image(&self, text: &str) -> Result<String> {
        let images = containerd::images(self.node(1))?;
        let found = images.iter().find(|image| image.contains(text));
        found.cloned().with_context(|| format!("no image has {text:?} in its name: {images:?}"))
    }
}

/// Makes a cluster, and tells of each step. What one that failed leaves can be looked at, until
/// [`down`].
///
/// # Errors
/// A cluster of this name is up, or a part does not start; with what is wrong with it.
pub fn up(plan: &Plan, options: &Options, tell: &(dyn Fn(&str) + Sync)) -> Result<Cluster> {
    let _lock = lock(plan)?;
    ensure!(
        !cgroups::is_populated(plan)?,
        "cluster {} is up already: `{}` removes it, and `--name` makes another one beside it",
        plan.name(),
        plan.command_down()
    );
    remove(plan)?;
    build(plan, options, tell).with_context(|| {
        format!(
            "cluster {} did not come up; its logs are in {}, and `{}` removes it",
            plan.name(),
            plan.directory().display(),
            plan.command_down()
        )
    })
}

/// Removes a cluster of this name, or what is left of one; returns whether there was anything.
///
/// # Errors
/// Something cannot be removed.
pub fn down(plan: &Plan) -> Result<bool> {
    let lock = lock(plan)?;
    let was_there = cgroups::is_populated(plan)? || plan.directory().exists();
    remove(plan)?;
    fs::remove_file(plan.lock_file()).ok();
    drop(lock);
    Ok(was_there)
}

fn remove(plan: &Plan) -> Result<()> {
    cgroups::remove(plan)?;
    fabric::remove(plan);
    match fs::remove_dir_all(plan.directory()) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", plan.directory().display()))
        }
        _ => Ok(()),
    }
}

fn lock(plan: &Plan) -> Result<File> {
    let path = plan.lock_file();
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

fn build(plan: &Plan, options: &Options, tell: &(dyn Fn(&str) + Sync)) -> Result<Cluster> {
    let start = Instant::now();
    let said = |what: &str| tell(&format!("{:5.1} s  {what}", start.elapsed().as_secs_f64()));
    let archives = images::archives()?;
    fs::create_dir_all(plan.directory())
        .with_context(|| format!("cannot make {}", plan.directory().display()))?;
    let fabric = Fabric::create(plan, options.cni)?;
    let (plane, nodes) = thread::scope(|scope| {
        let plane = scope.spawn(|| {
            let plane = control_plane::start(plan, &fabric)?;
            said("control plane is ready");
            Ok::<_, anyhow::Error>(plane)
        });
        let nodes: Vec<_> = (1..=NODES)
            .zip(&fabric.nodes)
            .map(|(number, netns)| {
                let archives = &archives;
                scope.spawn(move || build_node(plan, options, number, netns, archives))
            })
            .collect();
        (join(plane), nodes.into_iter().map(join).collect::<Result<Vec<_>>>())
    });
    let mut daemons = vec![plane?];
    let mut built = Vec::new();
    for (node, containerd) in nodes? {
        built.push(node);
        daemons.push(containerd);
    }
    said("containerd has the images");
    let kubectl = Kubectl::new(plan, fabric.control.clone())?;
    control_plane::create_nodes(&kubectl)?;
    for node in &built {
        daemons.push(kubelet::start(plan, node)?);
    }
    let mut cluster = Cluster { plan: plan.clone(), fabric, nodes: built, kubectl, daemons };
    let done = cluster.install(options, &said);
    done.with_context(|| cluster.describe())?;
    scripts::write(&cluster)?;
    Ok(cluster)
}

fn build_node(
    plan: &Plan,
    options: &Options,
    number: u8,
    netns: &std::sync::Arc<Netns>,
    archives: &[PathBuf],
) -> Result<(Node, Daemon)> {
    let node = Node::create(plan, number, netns.clone())?;
    cni::configure(&node, options.cni)?;
    let containerd = containerd::start(&node, images::PAUSE)?;
    for archive in archives {
        containerd::import(&node, archive)?;
    }
    containerd::pin(&node, &containerd::images(&node)?)?;
    Ok((node, containerd))
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}

/// How long a step of the installation may take, as kubectl takes it.
const TIMEOUT: &str = "--timeout=90s";

impl Cluster {
    fn install(&mut self, options: &Options, said: &(dyn Fn(&str) + Sync)) -> Result<()> {
        let dns = self.image("coredns/coredns:")?;
        let example = self.image("/agnhost:")?;
        let roll = |what: &str, namespace: &str| {
            self.kubectl.run(&["rollout", "status", what, "-n", namespace, TIMEOUT])
        };
        match options.proxy {
            Proxy::Lb => addons::install_lb(&self.kubectl, &self.plan)?,
            Proxy::KubeProxy => {
                let objects = kube_proxy::objects(&self.image("/kube-proxy:")?);
                self.kubectl.apply(&list(&objects))?;
            }
            Proxy::None => {}
        }
        addons::install_example(&self.kubectl, &example)?;
        if options.cni != Cni::Flannel {
            self.wait_nodes()?;
            said("nodes are ready");
        }
        match options.proxy {
            Proxy::Lb => {
                roll("daemonset/lb-agent", "kube-system")?;
                said("lb-agent is ready on every node");
            }
            Proxy::KubeProxy => {
                roll("daemonset/kube-proxy", "kube-system")?;
                said("kube-proxy runs on every node");
            }
            Proxy::None => {}
        }
        // What follows needs the API server's ClusterIP, and tries less and less often while it
        // does not reach it.
        if options.cni == Cni::Flannel {
            let objects = flannel::objects(&self.image("/flannel:")?, options.proxy == Proxy::None);
            self.kubectl.apply(&list(&objects))?;
            roll(&format!("daemonset/{}", flannel::NAME), flannel::NAMESPACE)?;
            self.wait_nodes()?;
            said("flannel runs, nodes are ready");
        }
        if options.proxy == Proxy::None {
            addons::install_dns(&self.kubectl, &dns)?;
            return self.check_running();
        }
        addons::install_dns(&self.kubectl, &dns)?;
        roll("deployment/coredns", "kube-system")?;
        roll("deployment/web", addons::EXAMPLE)?;
        said("CoreDNS and the example are ready");
        self.check_running()
    }

    fn wait_nodes(&self) -> Result<()> {
        self.kubectl.run(&["wait", "--for=condition=Ready", "node", "--all", TIMEOUT]).map(drop)
    }

    /// What the cluster looks like, for an error about it.
    pub fn describe(&mut self) -> String {
        let pods = ["get", "nodes,pods", "--all-namespaces", "-o", "wide"];
        let events = ["events", "--all-namespaces", "--types=Warning"];
        let shown = [&pods[..], &events[..]].map(|arguments| {
            self.kubectl.run(arguments).unwrap_or_else(|error| format!("{error:#}"))
        });
        let ended = self.daemons.iter_mut().filter_map(|daemon| daemon.check_running().err());
        let ended: Vec<String> = ended.map(|error| format!("{error:#}")).collect();
        [&shown[..], &ended[..]].concat().join("\n")
    }
}
