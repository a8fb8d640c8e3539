//! What the connect-time hooks do with a destination, before any packet is sent.

use lb_common::{
    abi::{
        counter::{Hook, Reason},
        frontend::TCP,
        settings::Settings,
    },
    balance::{
        Endpoint, Origin,
        socket::{self, Caller, Decision},
    },
};

use super::{
    describe,
    facts::{Facts, endpoint, text},
    pinned::PinnedFamily,
    report::{Outcome, Step},
    surroundings::Surroundings,
    tables::{Look, Overlay, Reader},
};

/// The socket that calls connect().
#[derive(Clone, Copy, Debug)]
pub(super) struct Socket {
    /// The cookie of its network namespace; 0 = unknown: it cannot be derived from a
    /// pod's address.
    pub(super) netns: u64,
    /// Whether that is the namespace of the node.
    pub(super) is_node: bool,
}

impl Caller for Socket {
    fn netns(&self) -> u64 {
        self.netns
    }

    fn is_node(&self) -> bool {
        self.is_node
    }

    fn datagram_socket(&self) -> Option<u64> {
        None
    }
}

/// Runs the connect-time decision for the destination of `facts`. The outcome is that of the
/// connection, if the hook decides it.
pub(super) fn connect<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    facts: &Facts<'_, F, R>,
    around: &S,
    caller: Socket,
) -> (Step, Option<Outcome>) {
    let hook = if F::BITS == 32 { Hook::Connect4 } else { Hook::Connect6 };
    let mut step = Step {
        hook: hook.name(),
        source: text::<F>(facts.source),
        destination: text::<F>(facts.destination),
        verdict: "none",
        ..Step::default()
    };
    let sends = if F::BITS == 32 { Hook::Sendmsg4 } else { Hook::Sendmsg6 };
    let is_tcp = facts.protocol == TCP;
    step.attached = around.has_socket_hook(hook) && (is_tcp || around.has_socket_hook(sends));
    if !step.attached {
        let what = if is_tcp { "TCP" } else { "UDP" };
        let text = format!("none: no connect-time hook for {what} is attached");
        step.say("hook", text);
        return (step, None);
    }
    if facts.settings.flags & Settings::ONLY_NODE_SOCKETS != 0 && !caller.is_node {
        step.say("hook", "none: --socket-lb node leaves sockets of pods to the packet path");
        return (step, None);
    }
    step.say("hook", format!("{}, for every process below --cgroup", hook.name()));
    let mut overlay = Overlay::new(facts.reader);
    let decision = decide(facts, &mut overlay, caller);
    describe(facts, caller, &overlay, &decision, &mut step);
    let outcome = finish(facts, &decision, &mut step);
    (step, outcome)
}

fn decide<F: PinnedFamily, R: Reader<F>>(
    facts: &Facts<'_, F, R>,
    overlay: &mut Overlay<'_, F, R>,
    caller: Socket,
) -> Decision<F::Address> {
    socket::decide(facts.destination, facts.protocol, &caller, facts.settings, overlay)
}

/// Describes the entries that led to the decision.
fn describe<F: PinnedFamily, R: Reader<F>>(
    facts: &Facts<'_, F, R>,
    caller: Socket,
    overlay: &Overlay<'_, F, R>,
    decision: &Decision<F::Address>,
    step: &mut Step,
) {
    if matches!(decision, Decision::Untouched(Reason::NotService)) {
        return;
    }
    let Some(frontend) = facts.frontend(step) else { return };
    if overlay.looks.iter().any(|look| matches!(look, Look::Range(..))) {
        facts.ranges(&frontend, F::settings(facts.settings).node_source, step);
    }
    let is_left = matches!(decision, Decision::Untouched(_));
    if is_left || matches!(decision, Decision::Refuse(Reason::SourceNotAllowed, _)) {
        return;
    }
    let Some(eligible) = facts.policy(&frontend, Origin::Inside, step) else { return };
    let service = facts.reader.service(frontend.service).unwrap_or_default();
    if service.affinity_seconds > 0 && caller.netns == 0 {
        let text = "ClientIP: connect() identifies the client by its network namespace, which \
                    cannot be derived from an address; see `lb-agent get affinity`";
        step.say("affinity", text);
    } else if service.affinity_seconds > 0 {
        let entry = overlay.looks.iter().find_map(|look| match look {
            Look::Affinity(entry) => Some(*entry),
            _ => None,
        });
        let is_used = !describe::is_random(overlay);
        describe::describe_affinity(facts.reader, &service, entry.flatten(), is_used, step);
    }
    if describe::is_random(overlay) {
        step.say("choice", describe::one_of(eligible.range.length()));
    } else if let Decision::Translate(to) = decision {
        let bound = text::<F>(*to);
        for candidate in step.backends.iter_mut().filter(|candidate| candidate.address != bound) {
            candidate.possible = false;
            candidate.why_not = Some("session affinity selects another backend".to_owned());
        }
        step.say("choice", "the backend of the affinity entry");
    }
}

/// Describes the decision.
fn finish<F: PinnedFamily, R: Reader<F>>(
    facts: &Facts<'_, F, R>,
    decision: &Decision<F::Address>,
    step: &mut Step,
) -> Option<Outcome> {
    let source = text::<F>(facts.source);
    let (verdict, reason, outcome) = match *decision {
        Decision::Untouched(reason) => ("pass", reason, None),
        Decision::Refuse(reason, _) => {
            let denied = matches!(reason, Reason::SourceNotAllowed);
            let error = if denied { "EPERM" } else { "ECONNREFUSED" };
            let text = format!("connect() fails with {error}");
            let destination = text_of::<F>(facts.destination);
            ("answer", reason, Some(Outcome { result: "answered", source, destination, text }))
        }
        Decision::Translate(to) => {
            let to = text_of::<F>(to);
            let possible = step.possible();
            let text = match possible {
                0 | 1 => format!(
                    "the socket is connected directly to {to}; its packets need no translation"
                ),
                more => format!(
                    "the socket is connected directly to one of {more} backends; its packets need \
                     no translation"
                ),
            };
            step.new_source = Some(source.clone());
            step.new_destination = Some(to.clone());
            let outcome = Outcome { result: "connected", source, destination: to, text };
            ("translate", Reason::SocketTranslated, Some(outcome))
        }
    };
    (step.verdict, step.reason) = (verdict, Some(reason.name()));
    let text = format!("{} (counted as {} {})", reason.meaning(), step.hook, reason.name());
    step.say("verdict", text);
    outcome
}

fn text_of<F: PinnedFamily>(to: Endpoint<F::Address>) -> String {
    text::<F>(endpoint::<F>(to.address, to.port))
}
