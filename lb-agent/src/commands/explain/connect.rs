//! What connect() makes of an address, before there is a packet.

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

/// Who calls connect().
#[derive(Clone, Copy, Debug)]
pub(super) struct Socket {
    /// The cookie of its network namespace; 0 = not known, as a pod's address does not tell.
    pub(super) netns: u64,
    /// Whether that is the node's own.
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

/// What connect() makes of the destination of `facts`, and what becomes of the connection if
/// that is the end of it.
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
        let text = format!("is not translated: no connect-time hook for {what} is attached");
        step.say("caught", text);
        return (step, None);
    }
    if facts.settings.flags & Settings::ONLY_NODE_SOCKETS != 0 && !caller.is_node {
        step.say("caught", "is not translated: --socket-lb node leaves pods' to the packet's way");
        return (step, None);
    }
    step.say("caught", format!("by {hook}, for every process below --cgroup", hook = hook.name()));
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

/// Tells what was found on the way to a decision.
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
    let Some(frontend) = facts.front_end(step) else { return };
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
        let text = "ClientIP: the client is its network namespace here, which an address does \
                    not tell: see lb-agent get affinity";
        step.say("affinity", text);
    } else if service.affinity_seconds > 0 {
        let entry = overlay.looks.iter().find_map(|look| match look {
            Look::Affinity(entry) => Some(*entry),
            _ => None,
        });
        let is_used = !describe::by_chance(overlay);
        describe::say_affinity(facts.reader, &service, entry.flatten(), is_used, step);
    }
    if describe::by_chance(overlay) {
        step.say("choice", describe::one_of(eligible.range.length()));
    } else if let Decision::Translate(to) = decision {
        let bound = text::<F>(*to);
        for candidate in step.backends.iter_mut().filter(|candidate| candidate.address != bound) {
            candidate.possible = false;
            candidate.why_not = Some("the client is bound to another".to_owned());
        }
        step.say("choice", "the one that the client is bound to");
    }
}

/// Tells the decision.
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
                    "the socket is connected to {to} itself: no program touches its packets"
                ),
                more => format!(
                    "the socket is connected to one of {more} backends itself: no program touches its \
                     packets"
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
