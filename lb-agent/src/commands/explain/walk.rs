//! A packet's path through the programs of this node.
//!
//! The core runs for each program, over tables that keep aside what it writes. Between two
//! programs the kernel's routes decide.

use std::net::IpAddr;

use lb_common::{
    abi::{
        counter::Hook,
        flow::{Action, Tuple},
    },
    balance::{Site, Verdict},
};

use super::{
    ExplainError,
    datapath::{Datapath, Judged},
    describe,
    facts::{endpoint, text},
    pinned::PinnedFamily,
    report::{Outcome, Step},
    surroundings::{Device, Route, Surroundings, device_text},
    tables::Reader,
};
use crate::programs::hook::Direction;

/// The kernel's index of the loopback device.
const LOOPBACK: u32 = 1;
/// A packet on its path.
pub(super) struct Walk<'a, F: PinnedFamily, R: Reader<F>, S> {
    datapath: Datapath<'a, F, R, S>,
    /// What each program on the path did with the packet.
    pub(super) steps: Vec<Step>,
}

impl<'a, F: PinnedFamily, R: Reader<F>, S: Surroundings> Walk<'a, F, R, S> {
    /// A packet of `protocol`: of the existing flow of `tuple`, else one that opens a flow.
    pub(super) fn new(
        reader: &'a R,
        around: &'a S,
        protocol: u8,
        tuple: &Tuple<F::Address>,
    ) -> Self {
        Self { datapath: Datapath::new(reader, around, protocol, tuple), steps: Vec::new() }
    }

    /// Whether the packet would open a flow.
    pub(super) fn opens(&self) -> bool {
        self.datapath.opens()
    }

    /// The packet is sent by a pod of this node.
    ///
    /// # Errors
    /// [`ExplainError::NoPod`] if the source is not a pod of this node.
    pub(super) fn sent_by_pod(
        &mut self,
        tuple: Tuple<F::Address>,
    ) -> Result<Outcome, ExplainError> {
        let source = F::ip(tuple.source);
        let device = match self.datapath.around.route(source) {
            Route::Device { device, .. } => device,
            Route::Local => {
                return Err(ExplainError::NoPod {
                    client: source,
                    why: "an address of this node",
                    at: "node".into(),
                });
            }
            Route::Unreachable(_) => return Ok(self.unseen(Hook::FromPod, None, tuple)),
        };
        if self.datapath.around.program(device.index, Direction::Ingress) == Some(Hook::FromDevice)
        {
            let why = "reached through an external device";
            return Err(ExplainError::NoPod { client: source, why, at: device.name });
        }
        let is_pod = |device: &Device| {
            self.datapath.around.program(device.index, Direction::Ingress) == Some(Hook::FromPod)
        };
        let device = if is_pod(&device) {
            device
        } else {
            match self.datapath.around.ports(device.index).iter().find(|port| is_pod(port)) {
                Some(_) => {
                    Device { index: device.index, name: format!("a port of {}", device.name) }
                }
                None => return Ok(self.unseen(Hook::FromPod, Some(device), tuple)),
            }
        };
        Ok(self.ingress(Hook::FromPod, Site::FromPod, device, tuple))
    }

    /// The packet is sent by a process of this node.
    ///
    /// # Errors
    /// [`ExplainError::NoNode`] if the source is not an address of this node.
    pub(super) fn sent_by_node(
        &mut self,
        tuple: Tuple<F::Address>,
    ) -> Result<Outcome, ExplainError> {
        let source = F::ip(tuple.source);
        match self.datapath.around.route(source) {
            Route::Local => Ok(self.leave(tuple, None)),
            _ => Err(ExplainError::NoNode { client: source }),
        }
    }

    /// The packet is received on a device.
    pub(super) fn received(&mut self, device: Device, tuple: Tuple<F::Address>) -> Outcome {
        match self.datapath.around.program(device.index, Direction::Ingress) {
            Some(Hook::FromPod) => self.ingress(Hook::FromPod, Site::FromPod, device, tuple),
            Some(Hook::FromDevice) => {
                self.ingress(Hook::FromDevice, Site::FromDevice, device, tuple)
            }
            _ => self.unseen(Hook::FromDevice, Some(device), tuple),
        }
    }

    /// No program sees the packet on ingress.
    fn unseen(&mut self, hook: Hook, device: Option<Device>, tuple: Tuple<F::Address>) -> Outcome {
        let mut step = self.step(hook, device.as_ref(), &tuple);
        step.verdict = "none";
        step.attached = false;
        let place = device.as_ref().map_or("its interface", |device| &device.name);
        step.say("hook", format!("none: no lb program is attached to {place}"));
        self.steps.push(step);
        self.leave(tuple, Some(&device.unwrap_or(Device { index: u32::MAX, name: "-".into() })))
    }

    fn step(&self, hook: Hook, device: Option<&Device>, tuple: &Tuple<F::Address>) -> Step {
        Step {
            hook: hook.name(),
            device: device.map(|device| device.name.clone()),
            attached: true,
            source: text::<F>(endpoint::<F>(tuple.source, tuple.source_port)),
            destination: text::<F>(endpoint::<F>(tuple.destination, tuple.destination_port)),
            ..Step::default()
        }
    }

    /// Runs the core on the packet as the program at `hook` does, and describes the decision.
    fn judge(
        &mut self,
        hook: Hook,
        site: Site,
        device: &Device,
        tuple: &Tuple<F::Address>,
    ) -> Judged<F> {
        let before = self.datapath.overlay.fork();
        let judged = self.datapath.judge(site, tuple);
        let mut step = self.step(hook, Some(device), tuple);
        describe::step(&self.datapath, &before, &judged, device, &mut step);
        self.datapath.overlay.looks.clear();
        self.steps.push(step);
        judged
    }

    /// The packet is received on a device that has a program.
    fn ingress(
        &mut self,
        hook: Hook,
        site: Site,
        device: Device,
        tuple: Tuple<F::Address>,
    ) -> Outcome {
        let judged = self.judge(hook, site, &device, &tuple);
        match by_stack(&judged) {
            Some(tuple) => self.leave(tuple, Some(&device)),
            None => self.end(&judged, &device),
        }
    }

    /// The kernel routes the packet to a socket of this node or out of a device.
    fn leave(&mut self, tuple: Tuple<F::Address>, ingress: Option<&Device>) -> Outcome {
        let to = F::ip(tuple.destination);
        let (device, via) = match self.datapath.around.route(to) {
            Route::Local if ingress.is_none() => {
                (Device { index: LOOPBACK, name: self.datapath.around.name(LOOPBACK) }, None)
            }
            Route::Local => return outcome::<F>("delivered", &tuple, "to a process of this node"),
            Route::Device { device, via } => (device, via),
            Route::Unreachable(why) => {
                let text = format!("the kernel has no route to {to} ({why})");
                return outcome::<F>("dropped", &tuple, &text);
            }
        };
        let ingress = ingress.map_or(0, |device| device.index);
        let (hook, site) = match self.datapath.around.program(device.index, Direction::Egress) {
            Some(hook @ Hook::ToDevice) => {
                (hook, Site::ToDevice { ifindex: device.index, ingress })
            }
            Some(hook @ Hook::ToPod) => (hook, Site::ToPod),
            Some(hook @ Hook::Loopback) => (hook, Site::Loopback),
            _ => return self.transmit(&tuple, &device, via),
        };
        let judged = self.judge(hook, site, &device, &tuple);
        match by_stack(&judged) {
            Some(tuple) => self.transmit(&tuple, &device, via),
            None => self.end(&judged, &device),
        }
    }

    /// The packet is transmitted by a device; no more programs see it.
    fn transmit(&self, tuple: &Tuple<F::Address>, device: &Device, via: Option<IpAddr>) -> Outcome {
        if device.index == LOOPBACK {
            return outcome::<F>("delivered", tuple, "to a process of this node");
        }
        let is_pod = match self.datapath.around.program(device.index, Direction::Egress) {
            Some(hook) => hook == Hook::ToPod,
            None => {
                let of_pod = |port: &Device| {
                    self.datapath.around.program(port.index, Direction::Egress) == Some(Hook::ToPod)
                };
                self.datapath.around.ports(device.index).iter().any(of_pod)
            }
        };
        let result = if is_pod { "delivered" } else { "leaves" };
        outcome::<F>(result, tuple, &device_text(device, via))
    }

    /// The program ends the packet's path through the stack: it redirects, answers or drops it.
    fn end(&self, judged: &Judged<F>, device: &Device) -> Outcome {
        match judged.verdict {
            Verdict::Translate(_) => self.redirect(judged, device),
            verdict => ended::<F>(judged.packet.tuple(), verdict),
        }
    }

    /// The program redirects the packet, past the stack.
    fn redirect(&self, judged: &Judged<F>, device: &Device) -> Outcome {
        let (rewrite, action) = (&judged.work.out.rewrite, judged.work.out.action);
        match action {
            Action::REQUEST_HAIRPIN | Action::REPLY_HAIRPIN => {
                let text = format!("back out of {}, to the pod that it came from", device.name);
                outcome::<F>("delivered", rewrite, &text)
            }
            Action::REQUEST_LOOPBACK | Action::REPLY_INTO_DEVICE => {
                outcome::<F>("delivered", rewrite, "to a process of this node")
            }
            _ => {
                // The inner packet of an encapsulated one is unchanged.
                let is_encapsulated = action == Action::REQUEST_TUNNEL;
                let tuple = if is_encapsulated { judged.packet.tuple() } else { rewrite };
                let to = F::ip(rewrite.destination);
                match self.datapath.around.route(to) {
                    Route::Device { device, via } if is_encapsulated => {
                        let text = format!("encapsulated to {to}, {}", device_text(&device, via));
                        outcome::<F>("leaves", tuple, &text)
                    }
                    Route::Device { device, via } => self.transmit(tuple, &device, via),
                    Route::Local | Route::Unreachable(_) => {
                        let text = format!("no_route: the kernel has no route to {to}");
                        outcome::<F>("dropped", tuple, &text)
                    }
                }
            }
        }
    }
}

/// The packet as the stack continues with it, if it does.
fn by_stack<F: PinnedFamily>(judged: &Judged<F>) -> Option<Tuple<F::Address>> {
    match judged.verdict {
        Verdict::Pass(_) => Some(*judged.packet.tuple()),
        Verdict::Translate(_) => match judged.work.out.action {
            Action::REQUEST | Action::REPLY | Action::REPLY_DIRECT => Some(judged.work.out.rewrite),
            _ => None,
        },
        Verdict::Drop(_) | Verdict::Answer(..) => None,
    }
}

fn outcome<F: PinnedFamily>(result: &'static str, tuple: &Tuple<F::Address>, how: &str) -> Outcome {
    let source = text::<F>(endpoint::<F>(tuple.source, tuple.source_port));
    let destination = text::<F>(endpoint::<F>(tuple.destination, tuple.destination_port));
    let text = match result {
        "dropped" => format!("dropped: {how}"),
        _ => format!("{result} {how}, as {source} -> {destination}"),
    };
    Outcome { result, source, destination, text }
}

/// The outcome of a packet that is answered or dropped.
fn ended<F: PinnedFamily>(tuple: &Tuple<F::Address>, verdict: Verdict) -> Outcome {
    let (result, reason) = match verdict {
        Verdict::Answer(_, reason) => ("answered", reason),
        Verdict::Drop(reason) | Verdict::Pass(reason) | Verdict::Translate(reason) => {
            ("dropped", reason)
        }
    };
    Outcome { text: reason.meaning().to_owned(), ..outcome::<F>(result, tuple, "") }
}
