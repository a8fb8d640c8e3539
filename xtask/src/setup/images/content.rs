//! What the images are filled with: Debian's programs with the libraries that they need.

use std::fs;

use anyhow::{Context, Result};

use crate::image::elf;
use crate::image::layer::Layer;
use crate::workspace::{Workspace, on_path};

pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) const NGINX_CONFIGURATION: &str = "/etc/nginx/nginx.conf";

/// The tools of clients in the image of agnhost.
const TOOLS: [&str; 16] = [
    // Upstream's scripts are written for this shell; busybox's would run its own nc and wget.
    "bash",
    "bridge",
    "conntrack",
    "curl",
    "dig",
    "getent",
    "host",
    "hostname",
    "ip",
    "iperf3",
    "nc.openbsd",
    "nft",
    "nslookup",
    "ss",
    "timeout",
    "wget",
];

/// An answer for those who look at the server.
const PAGE: &str = "<!doctype html>\n<title>nginx</title>\n<h1>Welcome to nginx</h1>\n";

const NGINX: &str = "\
user root;
daemon off;
error_log stderr;
pid /tmp/nginx.pid;
events {}
http {
    access_log /dev/stdout;
    server {
        listen 80;
        root /usr/share/nginx/html;
    }
}
";

/// What programs expect in every file system.
pub(super) fn base() -> Layer {
    let mut layer = Layer::default();
    layer
        .bytes("/etc/passwd", *b"root:x:0:0:root:/root:/bin/sh\n", 0o644)
        .bytes("/etc/group", *b"root:x:0:\n", 0o644)
        .bytes("/etc/nsswitch.conf", *b"passwd: files\ngroup: files\nhosts: files dns\n", 0o644)
        .directory("/root", 0o700)
        .directory("/tmp", 0o1777)
        .directory("/run", 0o755)
        .directory("/var/tmp", 0o1777);
    layer
}

/// A shell with the tools of clients; busybox is what is missing among them.
pub(super) fn tools(workspace: &Workspace) -> Result<Layer> {
    let mut layer = base();
    applets(workspace, &mut layer)?;
    for name in TOOLS {
        program(&mut layer, name, &format!("/bin/{name}"))?;
    }
    layer.link("/bin/sh", "bash").link("/bin/nc", "nc.openbsd");
    Ok(layer)
}

/// A program of this machine, with the libraries that it needs.
pub(super) fn program(layer: &mut Layer, name: &str, path: &str) -> Result<()> {
    let program =
        on_path(name).with_context(|| format!("there is no {name}: run `cargo xtask setup`"))?;
    layer.program(path, &program).map(drop)
}

/// busybox, and a link in /bin for each program that it is.
pub(super) fn applets(workspace: &Workspace, layer: &mut Layer) -> Result<()> {
    let program = on_path("busybox").context("there is no busybox: run `cargo xtask setup`")?;
    let output =
        workspace.command(&program).arg("--list").output().context("cannot start busybox")?;
    for name in String::from_utf8_lossy(&output.stdout).lines() {
        layer.link(&format!("/bin/{name}"), "busybox");
    }
    layer.file("/bin/busybox", program, 0o755);
    layer.link("/usr/bin/env", "/bin/busybox");
    Ok(())
}

/// The nginx that setup has unpacked.
pub(super) fn nginx(workspace: &Workspace) -> Result<Layer> {
    let mut layer = base();
    let program = workspace.cache().join("nginx/nginx");
    layer.program("/usr/sbin/nginx", &program)?;
    layer
        .bytes(NGINX_CONFIGURATION, NGINX, 0o644)
        .bytes("/usr/share/nginx/html/index.html", PAGE, 0o644)
        .directory("/var/lib/nginx", 0o755)
        .directory("/var/log/nginx", 0o755);
    Ok(layer)
}

/// iptables for both families, with the extensions that it loads.
pub(super) fn iptables(layer: &mut Layer) -> Result<()> {
    const PROGRAM: &str = "xtables-nft-multi";
    let program = on_path(PROGRAM)
        .with_context(|| format!("there is no {PROGRAM}: is iptables installed?"))?;
    layer.program(&format!("/usr/sbin/{PROGRAM}"), &program)?;
    for name in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            layer.link(&format!("/usr/sbin/{name}{suffix}"), PROGRAM);
        }
    }
    let extensions = elf::library_directory(&fs::read(&program)?)?.join("xtables");
    let shown = || format!("cannot read {}", extensions.display());
    for entry in fs::read_dir(&extensions).with_context(shown)? {
        let file = entry.with_context(shown)?.path();
        // Some need libraries that the program does not: libxt_statistic needs libm.
        layer.program(&file.display().to_string(), &file)?;
    }
    Ok(())
}
