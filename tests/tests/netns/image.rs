//! The agent's image, in a root directory that has nothing else.

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::namespace::Netns;
use lb_tests::harness::wait::PATIENCE;
use serde_json::Value;
use tempfile::TempDir;

/// The API server's name, which only the test's DNS server knows.
const NAME: &str = "api.lb.test";
/// The API server's port.
const PORT: u16 = 6443;
/// The image may have so many bytes.
const LARGEST: u64 = 20 << 20;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The image that `cargo xtask test` made before.
fn image() -> PathBuf {
    workspace().join("target/image/lb-agent.tar")
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed with {}: {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Unpacks the image's layers in their order.
fn unpack() -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    let (parts, root) = (dir.path().join("parts"), dir.path().join("root"));
    for new in [&parts, &root] {
        fs::create_dir(new)?;
    }
    run(Command::new("tar").arg("-xf").arg(image()).arg("-C").arg(&parts))?;
    let manifest: Value = serde_json::from_slice(&fs::read(parts.join("manifest.json"))?)?;
    let layers = manifest[0]["Layers"].as_array().context("the image has no layers")?;
    for layer in layers {
        let layer = parts.join(layer.as_str().context("a layer's path is a text")?);
        run(Command::new("tar").arg("-xzf").arg(layer).arg("-C").arg(&root))?;
    }
    Ok(dir)
}

#[test]
fn the_same_commit_makes_the_same_image() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let again = dir.path().join("again.tar");
    let mut xtask = Command::new("cargo");
    xtask.current_dir(workspace()).args(["xtask", "image", "--out"]).arg(&again);
    run(&mut xtask)?;
    let (first, second) = (fs::read(image())?, fs::read(again)?);
    ensure!(first == second, "two images differ: {} and {} bytes", first.len(), second.len());
    ensure!((first.len() as u64) < LARGEST, "the image has {} bytes", first.len());
    Ok(())
}

/// The programs have all their debug information in the object, so a path that the flags of the
/// build leave in would show here. `cargo xtask image --check` does the same with the whole image.
#[test]
fn a_copy_of_the_clone_makes_the_same_programs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("a-copy-of-the-clone/whose-path-has-another-length");
    fs::create_dir_all(copy.join("target"))?;
    // Files that are not committed yet are part of the comparison.
    let mut files = Command::new("sh");
    files.current_dir(workspace()).env("COPY", &copy).args([
        "-c",
        "git ls-files -z --cached --others --exclude-standard | \
         xargs -0 cp --parents --target-directory=\"$COPY\"",
    ]);
    run(&mut files)?;
    // The xtask of this clone, so that none need be built in the copy.
    let mut xtask = Command::new("cargo");
    xtask.current_dir(workspace()).args(["xtask", "build-ebpf"]);
    run(&mut xtask)?;
    // Programs of the host, which know nothing of the clone, are not built again.
    run(Command::new("cp")
        .arg("-a")
        .arg(workspace().join("target/ebpf"))
        .arg(copy.join("target")))?;
    let mut xtask = Command::new(workspace().join("target/debug/xtask"));
    xtask.arg("build-ebpf").env("CARGO_MANIFEST_DIR", copy.join("xtask"));
    run(&mut xtask)?;
    let object = |clone: &Path| fs::read(clone.join("target/ebpf/lb-ebpf.o"));
    let (first, second) = (object(&workspace())?, object(&copy)?);
    ensure!(first == second, "two objects differ: {} and {} bytes", first.len(), second.len());
    Ok(())
}

#[test]
fn the_image_has_no_shell_and_no_path_of_this_machine_but_licences_and_a_bill_of_materials()
-> Result<()> {
    let dir = unpack()?;
    let root = dir.path().join("root");
    let files = run(Command::new("find").arg(&root).args(["-type", "f", "-printf", "%P\n"]))?;
    let programs: Vec<_> = files.lines().filter(|file| file.contains("bin/")).collect();
    ensure!(programs == ["usr/local/bin/lb-agent"], "programs: {programs:?}");
    let home = std::env::home_dir().context("no home directory")?;
    let cargo = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let paths = [
        format!("{}/", workspace().canonicalize()?.display()),
        format!("{}/", cargo.display()),
        // The toolchain, and the cache of setup.
        format!("{}/.", home.display()),
    ];
    for file in files.lines() {
        let bytes = fs::read(root.join(file))?;
        for path in &paths {
            let is_there = bytes.windows(path.len()).any(|bytes| bytes == path.as_bytes());
            ensure!(!is_there, "{file} contains {path}");
        }
    }
    let documents = root.join("usr/share/doc");
    let sbom: Value = serde_json::from_slice(&fs::read(documents.join("lb-agent/sbom.cdx.json"))?)?;
    let components = sbom["components"].as_array().context("no components")?;
    for name in ["tokio", "aya-ebpf", "std", "libc6", "ca-certificates"] {
        let is_listed = components.iter().any(|component| component["name"] == name);
        ensure!(is_listed, "{name} is not in the bill of materials");
    }
    let third_party = fs::read_to_string(documents.join("lb-agent/THIRD-PARTY.txt"))?;
    ensure!(third_party.contains("Permission is hereby granted"), "no text of a licence");
    ensure!(documents.join("libc6/copyright").is_file(), "no licence of libc6");
    Ok(())
}

/// `e_machine` of an ELF header (elf(5)).
const MACHINE: std::ops::Range<usize> = 18..20;

#[test]
fn the_image_is_for_the_architecture_of_its_agent_and_of_no_unknown_one() -> Result<()> {
    let dir = unpack()?;
    let parts = dir.path().join("parts");
    let manifest: Value = serde_json::from_slice(&fs::read(parts.join("manifest.json"))?)?;
    let config = manifest[0]["Config"].as_str().context("the image has no configuration")?;
    let config: Value = serde_json::from_slice(&fs::read(parts.join(config))?)?;
    let mut agent = fs::read(dir.path().join("root/usr/local/bin/lb-agent"))?;
    let machine = u16::from_le_bytes([agent[MACHINE.start], agent[MACHINE.start + 1]]);
    let expected = match machine {
        62 => "amd64",
        183 => "arm64",
        other => anyhow::bail!("the agent is for ELF machine {other}"),
    };
    ensure!(config["architecture"] == expected && config["os"] == "linux", "{config:#}");

    // An agent for RISC-V would be an image that no node of the cluster can run.
    agent[MACHINE].copy_from_slice(&243u16.to_le_bytes());
    let (foreign, out) = (dir.path().join("foreign"), dir.path().join("foreign.tar"));
    fs::write(&foreign, agent)?;
    let mut xtask = Command::new("cargo");
    xtask.current_dir(workspace()).args(["xtask", "image", "--agent"]).arg(&foreign);
    let output = xtask.arg("--out").arg(&out).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let is_said = said.contains("ELF machine 243") && said.contains("x86-64 and AArch64");
    ensure!(!output.status.success() && is_said && !out.exists(), "{}: {said}", output.status);
    Ok(())
}

/// Answers every question for the address of a name by 127.0.0.1, and tells the names.
fn serve_dns(netns: &Netns) -> Result<Receiver<String>> {
    let socket = netns.run(|| Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 53))?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let (asked, names) = mpsc::channel();
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut packet) {
            let (name, answer) = answer(&packet[..length]);
            socket.send_to(&answer, client).ok();
            if asked.send(name).is_err() {
                return;
            }
        }
    });
    Ok(names)
}

/// The name that is asked for, and the answer (RFC 1035, section 4.1): its address, or that it
/// has none of this type.
fn answer(question: &[u8]) -> (String, Vec<u8>) {
    let mut name = Vec::new();
    let mut at = 12;
    while question[at] != 0 {
        let end = at + 1 + usize::from(question[at]);
        name.push(String::from_utf8_lossy(&question[at + 1..end]).into_owned());
        at = end;
    }
    let is_a = question[at + 1..at + 3] == [0, 1];
    let name = name.join(".");
    let is_known = name == NAME;
    let answers = u8::from(is_known && is_a);
    let mut packet = question[..2].to_vec();
    packet.extend([0x81, if is_known { 0x80 } else { 0x83 }, 0, 1, 0, answers, 0, 0, 0, 0]);
    packet.extend(&question[12..at + 5]);
    if answers == 1 {
        packet.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
    }
    (name, packet)
}

/// A program that starts the image's agent with nothing but the image, and what every container
/// has, in its root directory.
fn starter(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    for mount_point in ["proc", "sys"] {
        fs::create_dir(root.join(mount_point))?;
    }
    fs::write(root.join("etc/resolv.conf"), "nameserver 127.0.0.1\n")?;
    let starter = dir.join("start");
    let root = root.display();
    fs::write(
        &starter,
        format!(
            "#!/bin/sh\nexec unshare --mount --propagation private sh -c '\n\
             mount --rbind /proc {root}/proc && mount --rbind /sys {root}/sys &&\n\
             exec env -i PATH=/usr/sbin:/usr/bin chroot {root} /usr/local/bin/lb-agent \"$@\"' start \"$@\"\n"
        ),
    )?;
    fs::set_permissions(&starter, fs::Permissions::from_mode(0o755))?;
    Ok(starter)
}

#[test]
fn an_api_server_is_found_by_its_name_with_the_image_alone() -> Result<()> {
    let dir = unpack()?;
    let starter = starter(dir.path())?;
    let cluster = Cluster::builder().build()?;
    let node = cluster.node(1);
    let names = serve_dns(node.netns())?;
    let server = node.netns().run(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, PORT))?))?;
    let (request, requests) = mpsc::channel();
    thread::spawn(move || {
        for connection in server.incoming() {
            let Ok(mut connection) = connection else { return };
            connection.set_read_timeout(Some(Duration::from_secs(5))).ok();
            let mut bytes = [0; 4096];
            let length = connection.read(&mut bytes).unwrap_or_default();
            if request.send(String::from_utf8_lossy(&bytes[..length]).into_owned()).is_err() {
                return;
            }
        }
    });
    let master = format!("http://{NAME}:{PORT}");
    // With all capabilities, because it enters its root directory first.
    let mut command = Command::new(&starter);
    command.args(["run", "--master", &master, "--hostname-override", node.name()]);
    command.arg("--bpf-dir").arg(node.bpf_dir()).arg("--cgroup").arg(node.cgroup_tree().path());
    let agent = node.spawn("image", command)?;
    let first = requests.recv_timeout(3 * PATIENCE);
    let first = first.with_context(|| format!("no request\n{}", agent.tail()))?;
    ensure!(first.starts_with("GET /api"), "{first}");
    let host = format!("host: {NAME}:{PORT}");
    ensure!(first.to_lowercase().contains(&host), "{first}");
    ensure!(names.try_iter().any(|name| name == NAME), "nobody asked for {NAME}");
    Ok(())
}
