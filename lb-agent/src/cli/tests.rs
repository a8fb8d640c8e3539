use clap::CommandFactory as _;

use super::*;
use crate::options::{
    modes::{SocketLb, TcAttach, XdpMode},
    values::{Patterns, Protocol},
};

fn run(arguments: &[&str]) -> RunArgs {
    let all = ["lb-agent", "run"].into_iter().chain(arguments.iter().copied());
    match parse(all).expect("the arguments are good").command {
        Command::Run(run) => *run,
        other => panic!("{other:?} is not run"),
    }
}

fn usage_error(arguments: &[&str]) -> String {
    let all = ["lb-agent"].into_iter().chain(arguments.iter().copied());
    let error = parse(all).expect_err("the arguments are bad");
    assert_eq!(error.exit_code(), 2, "{arguments:?}");
    error.to_string()
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_flag_has_an_environment_twin() {
    let command = Cli::command();
    // `bench` runs in a pod like any other, where kubelet sets LB_PORT for a Service whose name is lb.
    let subcommands = command.get_subcommands().filter(|command| command.get_name() != "bench");
    for subcommand in subcommands {
        for argument in subcommand.get_arguments().filter(|argument| !argument.is_positional()) {
            let flag = argument.get_long().expect("every flag has a long form");
            // In the agent's container, LB_WAIT is that of `run`, which is no duration.
            if flag == "help" || (subcommand.get_name(), flag) == ("status", "wait") {
                continue;
            }
            let expected = match flag {
                "kubeconfig" => "KUBECONFIG".to_owned(),
                "hostname-override" => "NODE_NAME".to_owned(),
                flag => format!("LB_{}", flag.to_uppercase().replace('-', "_")),
            };
            let variable = argument.get_env().and_then(|variable| variable.to_str());
            assert_eq!(variable, Some(expected.as_str()), "{} --{flag}", subcommand.get_name());
        }
    }
}

#[test]
fn the_defaults_are_those_of_the_interface() {
    let run = run(&[]);
    assert_eq!(run.pins.bpf_dir, PathBuf::from("/sys/fs/bpf/lb"));
    assert_eq!(
        (run.socket_lb, run.xdp, run.tc_attach),
        (SocketLb::Auto, XdpMode::Auto, TcAttach::Auto)
    );
    assert_eq!((run.devices, run.pod_interfaces), (Patterns::Auto, Patterns::Auto));
    assert_eq!(run.log.verbosity, None);
    assert!(run.socket_lb_exclude_cgroups.is_empty() && !run.cleanup && !run.init_only);
}

#[test]
fn flags_are_read_into_their_types() {
    let run = run(&[
        "--manifests",
        "/m",
        "--socket-lb",
        "node",
        "--pod-interfaces",
        "veth*,cali?1",
        "--socket-lb-exclude-cgroups",
        "/a,/b",
        "-v",
        "--max-flows",
        "7",
    ]);
    assert_eq!(run.manifests, Some(PathBuf::from("/m")));
    assert_eq!(run.socket_lb, SocketLb::Node);
    assert_eq!(run.pod_interfaces.matches("cali12"), Some(false));
    assert_eq!(run.pod_interfaces.matches("cali21"), Some(true));
    assert_eq!(run.pod_interfaces.matches("veth"), Some(true));
    assert_eq!((run.log.verbosity, run.sizes.max_flows), (Some(4), Some(7)));
    assert_eq!(run.socket_lb_exclude_cgroups, ["/a", "/b"].map(PathBuf::from));
}

#[test]
fn usage_errors_name_the_value() {
    let rows: [(&[&str], &str); 8] = [
        (&[], "Usage"),
        (&["run", "--socket-lb", "some"], "some"),
        (&["run", "--nodeport-addresses", "primry"], "primry"),
        (&["run", "--max-services", "0"], "0"),
        (&["run", "--healthz-bind-address", "here:1"], "here:1"),
        (&["get", "pods"], "pods"),
        (&["cleanup", "--drain", "5 minutes"], "5 minutes"),
        (&["explain", "--from", "10.0.0.1", "--to", "10.0.0.2:80/sctp"], "sctp"),
    ];
    for (arguments, expected) in rows {
        let text = usage_error(arguments);
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
}

#[test]
fn explain_takes_an_address_without_a_port() {
    let cli = parse(["lb-agent", "explain", "--from", "fd00::1", "--to", "[fd00::2]:53/UDP"]);
    let Ok(Cli { command: Command::Explain(explain) }) = cli else { panic!("{cli:?}") };
    assert_eq!(explain.from, "[fd00::1]:40000".parse().expect("an address"));
    assert_eq!(explain.to.protocol, Protocol::Udp);
}

#[test]
fn durations_are_those_of_go() {
    let rows = [
        ("0", Some(0)),
        ("90s", Some(90_000)),
        ("1h30m", Some(5_400_000)),
        ("1.5s", Some(1_500)),
        ("500ms", Some(500)),
        ("", None),
        ("5", None),
        ("5x", None),
        ("s", None),
        ("-5s", None),
    ];
    for (text, milliseconds) in rows {
        assert_eq!(duration(text).ok(), milliseconds.map(Duration::from_millis), "{text:?}");
    }
}

#[test]
fn a_service_is_meant_with_all_its_ports_or_with_one() {
    let rows = [
        ("default/web", ["default/web", "default/web:http"], ["default/web2", "other/web"]),
        ("default/web:http", ["default/web:http"; 2], ["default/web", "default/web:https"]),
    ];
    for (text, meant, others) in rows {
        let pattern: ServicePattern = text.parse().expect("a Service");
        assert!(meant.iter().all(|name| pattern.matches(name)), "{text}");
        assert!(!others.iter().any(|name| pattern.matches(name)), "{text}");
    }
    let error = usage_error(&["get", "flows", "--service", "web"]);
    assert!(error.contains("is not a Service such as"), "{error}");
}
