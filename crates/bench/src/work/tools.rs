//! Kept tools, where the root folder has them: fio, iperf3, nginx.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{Settings, network, say};

/// Where programs are: in the root folder, and for the plain process on the host, of which those are copies.
const PATH: &str = "/bin:/usr/bin:/usr/sbin";
/// Where nginx listens.
pub(crate) const HTTP: u16 = 8080;

fn tool(name: &str) -> Command {
    let found = PATH.split(':').map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
    let mut command = Command::new(found.unwrap_or_else(|| name.into()));
    command.env_clear().env("PATH", PATH).stdin(Stdio::null());
    command
}

/// What a tool says in JSON.
fn json(mut command: Command) -> anyhow::Result<Value> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    let start = output.stdout.iter().position(|byte| *byte == b'{').unwrap_or(0);
    serde_json::from_slice(&output.stdout[start..]).with_context(|| format!("{name} says no JSON: {}", error.trim()))
}

/// The measures of the disk.
pub(super) fn fio(disk: &Path, is_direct: bool, time: Duration) -> anyhow::Result<()> {
    let run = |words: &str, side: &str, figure: &str| {
        let mut command = tool("fio");
        command.args(["--name=bench", "--output-format=json", "--time_based", "--fallocate=none"]);
        command.arg(format!("--direct={}", u8::from(is_direct)));
        command.arg(format!("--filename={}", disk.display())).arg(format!("--size={}", crate::site::DISK));
        command.arg(format!("--runtime={}ms", time.as_millis().max(500))).args(words.split(' '));
        let said = json(command)?;
        said["jobs"][0][side][figure].as_f64().with_context(|| format!("fio says no {figure}"))
    };
    let depth = "--ioengine=libaio --bs=4k --iodepth=32";
    say("disk-read", run("--ioengine=psync --bs=4k --rw=randread", "read", "iops")?);
    say("disk-read-32", run(&format!("{depth} --rw=randread"), "read", "iops")?);
    say("disk-write-32", run(&format!("{depth} --rw=randwrite"), "write", "iops")?);
    say("disk-read-seq", run("--ioengine=psync --bs=128k --rw=read", "read", "bw_bytes")? / 1e6);
    say("disk-write-seq", run("--ioengine=psync --bs=128k --rw=write", "write", "bw_bytes")? / 1e6);
    say("disk-sync", 1e6 / run("--ioengine=psync --bs=4k --rw=write --fdatasync=1", "write", "iops")?);
    Ok(())
}

/// Mbit/s of one stream, out of here or into here.
pub(super) fn iperf3(server: Ipv4Addr, time: Duration, reverse: bool) -> anyhow::Result<f64> {
    let mut command = tool("iperf3");
    command.args(["--client", &server.to_string(), "--json", "--time", &time.as_secs().max(1).to_string()]);
    command.args(reverse.then_some("--reverse"));
    let said = json(command)?;
    let rate = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let error = said["error"].as_str().unwrap_or("it has no result").to_owned();
    Ok(rate.with_context(|| format!("iperf3: {error}"))? / 1e6)
}

/// Serves a small file until it is killed.
pub(super) fn nginx(_settings: &Settings) -> anyhow::Result<()> {
    network::prepare()?;
    // The current folder is the root folder everywhere, which for the plain process is not `/`. It runs more than once.
    let folder = std::env::current_dir()?.join("tmp").join(format!("nginx-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let folder = folder.display();
    fs::write(format!("{folder}/index.html"), [b'x'; 1024])?;
    let configuration = format!(
        "user root; daemon off; master_process off; worker_processes 1; error_log stderr crit; pid {folder}/pid;\n\
         events {{ worker_connections 512; }}\n\
         http {{ access_log off; sendfile on; keepalive_requests 1000000;\n\
         client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};\n\
         uwsgi_temp_path {folder}; scgi_temp_path {folder};\n\
         server {{ listen {HTTP}; root {folder}; }} }}\n"
    );
    fs::write(format!("{folder}/nginx.conf"), configuration)?;
    let mut nginx = tool("nginx").args(["-e", "stderr", "-c", &format!("{folder}/nginx.conf")]).spawn()?;
    let start = Instant::now();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, HTTP));
    while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
        ensure!(nginx.try_wait()?.is_none(), "nginx has ended");
        ensure!(start.elapsed() < Duration::from_secs(30), "nginx does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    say("listening", 1);
    // The other side ends us; nginx is in our process group, or in our namespace, or in our machine.
    nginx.wait()?;
    Ok(())
}
