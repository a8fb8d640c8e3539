//! Describes in sentences what the core decided on a packet, and why.

use std::collections::HashMap;

use lb_common::{
    abi::{
        affinity::Affinity,
        counter::Reason,
        flow::{Action, Tuple},
        flow_table::Direction,
        frontend::{Frontend, FrontendKey, FrontendKind},
        service::Service,
        settings::PortRange,
    },
    balance::{self, Answer, Candidate, Endpoint, Origin, Site, Verdict, Work, types::Eligible},
    packet::{ACK, SYN},
};

use super::{
    datapath::{Datapath, Judged, run},
    facts::{Facts, endpoint, text},
    pinned::PinnedFamily,
    report::Step,
    surroundings::{Device, Route, Surroundings, device_text},
    tables::{Look, Overlay, Reader},
};
use crate::programs::hook;

/// How many slots of a Service are tried.
const TRIED: u32 = 1024;

/// The random number for which the core picks the slot at `position` of `length`.
pub(super) fn draw_of(position: u32, length: u32) -> u32 {
    ((u64::from(position) << 32).div_ceil(u64::from(length.max(1)))) as u32
}

/// Describes the decision in `step`; `before` holds the tables as they were before it.
pub(super) fn step<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    datapath: &Datapath<'_, F, R, S>,
    before: &Overlay<'_, F, R>,
    judged: &Judged<F>,
    device: &Device,
    step: &mut Step,
) {
    attached(judged.site, device, step);
    xdp(datapath, before, judged, device, step);
    let facts = facts(datapath, judged);
    let tuple = judged.packet.tuple();
    let origin = balance::origin(&judged.packet, judged.site, &datapath.settings);
    let candidate = balance::candidate::<F>(tuple.destination, judged.site, &datapath.settings);
    let is_known = flows(datapath, before, judged, &facts, step);
    if candidate == Candidate::Service || candidate == Candidate::Node && is_request(judged) {
        let frontend = facts.frontend(step);
        if let Some(frontend) = frontend
            && !is_known
        {
            let is_allowed = facts.ranges(&frontend, tuple.source, step);
            if is_allowed && !matches!(judged.verdict, Verdict::Pass(_)) {
                let eligible = facts.policy(&frontend, origin, step);
                affinity(datapath, &frontend, step);
                choice(datapath, before, judged, &frontend, eligible, step);
            }
        }
    }
    translation(datapath, judged, &facts, origin, step);
    verdict(judged.verdict, step);
}

/// Whether a packet addressed to this node may be a request to a Service.
fn is_request<F: PinnedFamily>(judged: &Judged<F>) -> bool {
    !matches!(judged.verdict, Verdict::Pass(Reason::NoFlow))
}

fn facts<'w, F: PinnedFamily, R: Reader<F>, S>(
    datapath: &'w Datapath<'_, F, R, S>,
    judged: &Judged<F>,
) -> Facts<'w, F, R> {
    let tuple = judged.packet.tuple();
    Facts {
        reader: datapath.overlay.reader(),
        settings: &datapath.settings,
        source: endpoint::<F>(tuple.source, tuple.source_port),
        destination: endpoint::<F>(tuple.destination, tuple.destination_port),
        protocol: judged.packet.protocol(),
    }
}

/// Describes the hook at which the program sees the packet.
fn attached(site: Site, device: &Device, step: &mut Step) {
    let direction = match site {
        Site::FromPod | Site::FromDevice => hook::Direction::Ingress,
        Site::ToPod | Site::ToDevice { .. } | Site::Loopback => hook::Direction::Egress,
    };
    step.say("hook", format!("{}, at tc {} of {}", step.hook, direction.name(), device.name));
}

/// Describes what XDP does with the packet before tc sees it.
fn xdp<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    datapath: &Datapath<'_, F, R, S>,
    before: &Overlay<'_, F, R>,
    judged: &Judged<F>,
    device: &Device,
    step: &mut Step,
) {
    if judged.site != Site::FromDevice {
        return;
    }
    let Some(mode) = datapath.around.xdp(device.index) else { return };
    let mut overlay = before.fork();
    let mut work = Work::default();
    let destination = judged.packet.tuple().destination;
    let candidate = balance::candidate::<F>(destination, judged.site, &datapath.settings);
    let decided = match candidate {
        Candidate::NotService => None,
        _ => {
            let (packet, settings) = (&judged.packet, &datapath.settings);
            balance::decide_known(candidate, packet, settings, &mut work, &mut overlay)
        }
    };
    let text = match decided {
        Some(Verdict::Translate(_)) => {
            "handles the packet with the same result if it can forward it, else leaves it to tc"
        }
        Some(Verdict::Drop(_)) => "drops the packet",
        _ => "leaves the packet to tc",
    };
    step.say("xdp", format!("{mode} runs first and {text}"));
}

/// Describes the flow entry of the packet. Returns whether the entry decided.
fn flows<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    datapath: &Datapath<'_, F, R, S>,
    before: &Overlay<'_, F, R>,
    judged: &Judged<F>,
    facts: &Facts<'_, F, R>,
    step: &mut Step,
) -> bool {
    let key = judged.packet.key;
    let found = datapath.overlay.looks.iter().find_map(|look| match look {
        Look::Flow(asked, Some(seen)) if *asked == key => Some(*seen),
        _ => None,
    });
    let was_asked = datapath.overlay.looks.iter().any(|look| matches!(look, Look::Flow(..)));
    let Some(seen) = found else {
        if was_asked {
            step.say("flow", "no entry");
        }
        return false;
    };
    facts.flow(&seen, step);
    if judged.packet.detail == ACK && seen.direction == Direction::Request {
        let packet = datapath.packet(judged.packet.tuple(), SYN);
        let (verdict, _) = run(&mut before.fork(), &datapath.settings, &packet, judged.site);
        let text = match verdict {
            Verdict::Translate(reason) => {
                if reason == Reason::Request {
                    "goes to the same backend"
                } else {
                    "selects a new backend"
                }
            }
            Verdict::Pass(reason) | Verdict::Drop(reason) | Verdict::Answer(_, reason) => {
                reason.meaning()
            }
        };
        step.say("new SYN", format!("from the same port: {text}"));
    }
    matches!(judged.verdict, Verdict::Translate(Reason::Request | Reason::Reply))
}

/// Describes the session affinity of the client.
fn affinity<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    datapath: &Datapath<'_, F, R, S>,
    frontend: &Frontend,
    step: &mut Step,
) {
    let reader = datapath.overlay.reader();
    let Some(service) = reader.service(frontend.service) else { return };
    let entry = datapath.overlay.looks.iter().find_map(|look| match look {
        Look::Affinity(entry) => Some(*entry),
        _ => None,
    });
    let is_used = !is_random(&datapath.overlay);
    if let Some(entry) = entry {
        describe_affinity(reader, &service, entry, is_used, step);
    }
}

/// Describes the affinity entry that the core looked up.
pub(super) fn describe_affinity<F: PinnedFamily, R: Reader<F>>(
    reader: &R,
    service: &Service,
    entry: Option<Affinity>,
    is_used: bool,
    step: &mut Step,
) {
    let seconds = service.affinity_seconds;
    let Some(bound) = entry else {
        step.say("affinity", format!("ClientIP for {seconds} s: no entry for this client yet"));
        return;
    };
    let idle =
        reader.now().wrapping_sub(bound.last_seen) / reader.settings().ticks_per_second.max(1);
    let to = reader.backend(bound.backend).map_or_else(
        || format!("#{}", bound.backend),
        |backend| text::<F>(endpoint::<F>(backend.address, backend.port)),
    );
    let unused = if is_used { "" } else { "; ignored: expired, or the backend is not eligible" };
    let text = format!("ClientIP for {seconds} s: entry for {to}, used {idle} s ago{unused}");
    step.say("affinity", text);
}

/// How a backend is selected for a client that session affinity has not bound yet.
const SPREAD: &str = "the backend that this client gets until one has answered it";

/// Whether the last run picked the slot that stands for the client.
fn is_spread<F: PinnedFamily, R: Reader<F>>(overlay: &Overlay<'_, F, R>) -> bool {
    overlay.looks.iter().any(|look| matches!(look, Look::Spread))
}

/// Whether the last run picked a slot, and did not use an affinity entry.
pub(super) fn is_random<F: PinnedFamily, R: Reader<F>>(overlay: &Overlay<'_, F, R>) -> bool {
    overlay.looks.iter().any(|look| matches!(look, Look::Slot(_)))
}

/// Describes the selection of a backend for a new flow, and tries every eligible one.
fn choice<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    datapath: &Datapath<'_, F, R, S>,
    before: &Overlay<'_, F, R>,
    judged: &Judged<F>,
    frontend: &Frontend,
    eligible: Option<Eligible>,
    step: &mut Step,
) {
    let Some(eligible) = eligible else { return };
    if !matches!(judged.verdict, Verdict::Translate(_) | Verdict::Answer(Answer::TimeExceeded, _)) {
        step.backends.iter_mut().for_each(|candidate| candidate.possible = false);
        return;
    }
    let reader = datapath.overlay.reader();
    let mut tried = HashMap::new();
    if is_spread(&datapath.overlay) {
        let chosen = datapath.overlay.looks.iter().rev().find_map(|look| match look {
            Look::Slot(id) => Some(*id),
            _ => None,
        });
        tried.insert(chosen.flatten(), judged.work);
        step.say("choice", SPREAD);
    } else if is_random(&datapath.overlay) {
        let length = eligible.range.length();
        for position in 0..length.min(TRIED) {
            let mut overlay = before.fork();
            overlay.draws = [draw_of(position, length)].into();
            let (_, work) = run(&mut overlay, &datapath.settings, &judged.packet, judged.site);
            let id = reader.slot(eligible.range.start() + position);
            tried.insert(id, work);
        }
        step.say("choice", one_of(length));
    } else {
        step.say("choice", "the backend of the affinity entry");
    }
    let bound = datapath.overlay.looks.iter().find_map(|look| match look {
        Look::Affinity(Some(bound)) => Some(bound.backend),
        _ => None,
    });
    if tried.is_empty() {
        tried.insert(bound, judged.work);
    }
    let ids = reader.backends_of(frontend.service);
    for (candidate, (id, _)) in step.backends.iter_mut().zip(ids) {
        match tried.get(&Some(id)) {
            Some(work) => {
                let source = client_address(judged.packet.tuple(), work);
                candidate.client_address = Some(F::ip(source).to_string());
                candidate.next_hop = Some(next_hop::<F, S>(datapath.around, work));
            }
            None if candidate.possible && is_spread(&datapath.overlay) => {
                candidate.possible = false;
                candidate.why_not = Some("this client gets another backend".to_owned());
            }
            None if candidate.possible && bound.is_some() => {
                candidate.possible = false;
                candidate.why_not = Some("session affinity selects another backend".to_owned());
            }
            None => {}
        }
    }
}

/// How one of `length` backends is selected.
pub(super) fn one_of(length: u32) -> String {
    match length {
        1 => "the only eligible backend".to_owned(),
        length => format!("one of {length} at random, each equally likely"),
    }
}

/// The client's address that a backend sees.
fn client_address<A: Copy>(tuple: &Tuple<A>, work: &Work<A>) -> A {
    if work.out.action == Action::REQUEST_TUNNEL { tuple.source } else { work.out.rewrite.source }
}

/// The next hop of a translated packet.
fn next_hop<F: PinnedFamily, S: Surroundings>(around: &S, work: &Work<F::Address>) -> String {
    let to = F::ip(work.out.rewrite.destination);
    match work.out.action {
        Action::REQUEST_HAIRPIN => return "back out of the ingress interface".to_owned(),
        Action::REQUEST_LOOPBACK => return "through lo".to_owned(),
        _ => {}
    }
    match around.route(to) {
        Route::Local => "to a process of this node".to_owned(),
        Route::Device { device, via } if work.out.action == Action::REQUEST_TUNNEL => {
            format!("encapsulated to {to} {}", device_text(&device, via))
        }
        Route::Device { device, via } => device_text(&device, via),
        Route::Unreachable(why) => format!("no route ({why})"),
    }
}

/// Describes the translated packet.
fn translation<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    datapath: &Datapath<'_, F, R, S>,
    judged: &Judged<F>,
    facts: &Facts<'_, F, R>,
    origin: Origin,
    step: &mut Step,
) {
    let Verdict::Translate(reason) = judged.verdict else { return };
    let (tuple, work) = (judged.packet.tuple(), &judged.work);
    if work.out.action == Action::REQUEST_TUNNEL {
        let node = F::ip(work.out.rewrite.destination);
        let text =
            format!("none: encapsulated to node {node}, the backend sees the client's address");
        (step.new_source, step.new_destination) =
            (Some(step.source.clone()), Some(step.destination.clone()));
        step.say("translation", text);
        return;
    }
    let side = |address, port| text::<F>(endpoint::<F>(address, port));
    let new = &work.out.rewrite;
    let (source, destination) =
        (side(new.source, new.source_port), side(new.destination, new.destination_port));
    let is_port_random = reason == Reason::FlowCreated && new.source_port != tuple.source_port;
    let is_example = is_port_random || step.possible() > 1;
    let example = if is_example { "for example " } else { "" };
    step.say("translation", format!("{example}{source} -> {destination}"));
    (step.new_source, step.new_destination) = (Some(source), Some(destination));
    let mut why = if new.source == tuple.source {
        kept_source_text(work.out.action).to_owned()
    } else {
        rewritten_source_text(work.out.action, facts, datapath, judged, origin)
    };
    if is_port_random {
        let PortRange { first, count } = datapath.settings.source_ports;
        let last = first.saturating_add(count.saturating_sub(1));
        why.push_str(&format!("; its port is picked at random from {first}-{last}"));
    }
    step.say("source", why);
}

fn kept_source_text(action: Action) -> &'static str {
    match action {
        action if action.is_reply() => "unchanged",
        Action::REQUEST_ROUTE => {
            "unchanged, the node's own: the program redirects the packet to its new route"
        }
        Action::REQUEST_LOOPBACK => "unchanged, the node's own: the packet re-enters through lo",
        _ => "unchanged: the backend sees the client's address, and the kernel routes the packet",
    }
}

fn rewritten_source_text<F: PinnedFamily, R: Reader<F>, S>(
    action: Action,
    facts: &Facts<'_, F, R>,
    datapath: &Datapath<'_, F, R, S>,
    judged: &Judged<F>,
    origin: Origin,
) -> String {
    if action.is_reply() {
        return "becomes the address that the client connected to".to_owned();
    }
    let is_masqueraded = datapath.settings.masquerades_all() && judged.site == Site::FromPod;
    let why = match (action, judged.site) {
        (Action::REQUEST_HAIRPIN, _) => {
            "the backend is the client itself, so its reply must come back through the node"
        }
        _ if is_masqueraded => "--masquerade-all",
        (_, Site::Loopback) => "the client's address is on lo, or other nodes may have it too",
        (Action::REQUEST_LOOPBACK, _) | (Action::REQUEST, _) => {
            "the client is outside the cluster, and only this node can send it the reply"
        }
        _ => "the reply must come back through this node",
    };
    let mut text = format!("becomes this node's address (SNAT): {why}");
    if let Some(why_not) = why_not_dsr(facts, datapath, judged, origin) {
        text.push_str(&format!("; no DSR: {why_not}"));
    }
    text
}

/// Why a packet to a Service with direct server return (DSR) is not encapsulated.
fn why_not_dsr<F: PinnedFamily, R: Reader<F>, S>(
    facts: &Facts<'_, F, R>,
    datapath: &Datapath<'_, F, R, S>,
    judged: &Judged<F>,
    origin: Origin,
) -> Option<&'static str> {
    let reader = datapath.overlay.reader();
    let Endpoint { address, port } = facts.destination;
    let key = FrontendKey::new(address, port, facts.protocol);
    let frontend = reader.frontend(&key)?;
    let service = reader.service(frontend.service)?;
    if service.flags & Service::DSR == 0 || judged.work.out.action != Action::REQUEST_FORWARD {
        return None;
    }
    Some(match origin {
        _ if frontend.kind.is_internal() => "it is only for external frontends",
        Origin::Pod | Origin::Inside => "the client is a pod",
        _ if reader.is_node(facts.source.address) => "the client is a node",
        _ if frontend.kind == FrontendKind::NODE_PORT && !reader.is_node(address) => {
            "other nodes do not recognise this address as a node address"
        }
        _ => "the address of the backend's node is unknown",
    })
}

/// Describes the verdict and the reason that is counted.
fn verdict(verdict: Verdict, step: &mut Step) {
    let (name, reason, how) = match verdict {
        Verdict::Pass(reason) => ("pass", reason, ""),
        Verdict::Drop(reason) => ("drop", reason, ""),
        Verdict::Translate(reason) => ("translate", reason, ""),
        Verdict::Answer(answer, reason) => ("answer", reason, answer_text(answer)),
    };
    step.verdict = name;
    step.reason = Some(reason.name());
    let hook = step.hook;
    let text = format!("{}{how} (counted as {hook} {})", reason.meaning(), reason.name());
    step.say("verdict", text);
}

fn answer_text(answer: Answer) -> &'static str {
    match answer {
        Answer::Reset => " with a TCP RST",
        Answer::PortUnreachable => " with ICMP port unreachable",
        Answer::ProtocolUnreachable => " with ICMP protocol unreachable",
        Answer::Echo => " with an echo reply",
        Answer::TimeExceeded => " with ICMP time exceeded",
    }
}
