//! How each contender is started with the same work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};

use crate::contender::{Contender, Kind};
use crate::instance::Launch;
use crate::netns::TAP;
use crate::site::Site;
use crate::work::{VARIABLE, VERB};

/// What the workload is to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Work {
    /// Nothing but to say that it is there, where this is empty.
    pub(crate) groups: Vec<&'static str>,
    /// For how long each measure goes on.
    pub(crate) millis: u64,
    /// Whether there is a disk.
    pub(crate) has_disk: bool,
    /// Whether kept tools measure, which are in the root folder.
    pub(crate) has_tools: bool,
    /// Whether there is a network, and where a container can open it.
    pub(crate) network: Option<PathBuf>,
}

/// What all contenders have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    pub(crate) limit: Duration,
    pub(crate) cpu: Option<usize>,
    /// MiB of a machine.
    pub(crate) memory: u64,
}

impl Common {
    /// MiB of a machine with this work: tools live in its memory, packed and unpacked at first.
    pub(crate) fn memory(&self, work: &Work) -> u64 {
        if work.has_tools { self.memory.max(1024) } else { self.memory }
    }
}

/// What the kernel of every machine is told. Ours has the rest of it by itself.
const CMDLINE: &str = "quiet loglevel=0";
/// What machines of others are told besides, so that their kernels do no more work than ours: what `vmm` tells by itself.
const SAME: &str = "panic=-1 tsc=reliable cryptomgr.notests console=ttyS0 8250.nr_uarts=1";

/// How to start it.
pub(crate) fn launch(contender: &Contender, site: &Site, work: &Work, common: Common) -> anyhow::Result<Launch> {
    let (command, clean) = match contender.kind {
        Kind::Process => (process(site, work), None),
        Kind::Container => container(contender, site, work)?,
        Kind::Vmm => (vmm(contender, site, work, common)?, None),
        Kind::Qemu => (qemu(contender, site, work, common)?, None),
        Kind::Firecracker => (firecracker(contender, site, work, common)?, None),
        Kind::CloudHypervisor => (cloud_hypervisor(contender, site, work, common)?, None),
    };
    Ok(Launch { command, clean, cpu: common.cpu, limit: common.limit })
}

impl Work {
    /// As words `KEY=VALUE`.
    fn pairs(&self, disk: &str) -> Vec<String> {
        let mut pairs = Vec::new();
        if !self.groups.is_empty() {
            pairs.push(format!("groups={}", self.groups.join(",")));
            pairs.push(format!("millis={}", self.millis));
        }
        if self.has_disk {
            pairs.push(format!("disk={disk}"));
        }
        pairs.extend(self.has_tools.then(|| "tools=1".to_owned()));
        pairs
    }

    /// The words of a process.
    fn words(&self, init: &str, disk: &str) -> Vec<String> {
        [init.to_owned(), VERB.to_owned()].into_iter().chain(self.pairs(disk)).collect()
    }

    /// The end of a kernel's command line. `end`: how the machine is left.
    fn cmdline(&self, end: &str) -> String {
        let pairs = self.pairs("/dev/vda").into_iter().chain([format!("end={end}")]);
        pairs.fold(CMDLINE.to_owned(), |line, pair| format!("{line} {VARIABLE}{pair}"))
    }
}

fn process(site: &Site, work: &Work) -> Command {
    let init = site.root().join("init");
    let words = work.words(&init.to_string_lossy(), &site.disk().to_string_lossy());
    let mut command = Command::new(init);
    command.args(&words[1..]).env_clear().current_dir(site.root());
    command
}

fn container(contender: &Contender, site: &Site, work: &Work) -> anyhow::Result<(Command, Option<Command>)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let bundle = site.own(&contender.name)?;
    let state = bundle.join("state");
    let config = bundle_config(site, work);
    fs::write(bundle.join("config.json"), config.to_string()).context("cannot write the container's configuration")?;
    let id = format!("vmm-bench-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut run = Command::new(&contender.program);
    run.arg("--root").arg(&state).arg("run").arg("--bundle").arg(&bundle).arg(&id);
    let mut delete = Command::new(&contender.program);
    delete.arg("--root").arg(&state).args(["delete", "--force", &id]);
    Ok((run, Some(delete)))
}

/// As `runc spec` has it: the namespaces, the rights and the mounts of a container, and no filter on system calls.
fn bundle_config(site: &Site, work: &Work) -> Value {
    let rights = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mounts = [
        json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] }),
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"] }),
    ];
    let namespaces = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let mut linux = json!({
        "namespaces": namespaces,
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    });
    let network = match &work.network {
        Some(path) => json!({ "type": "network", "path": path }),
        None => json!({ "type": "network" }),
    };
    linux["namespaces"].as_array_mut().expect("it is a list").push(network);
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    if !user.is_root() {
        linux["namespaces"].as_array_mut().expect("it is a list").push(json!({ "type": "user" }));
        linux["uidMappings"] = json!([{ "containerID": 0, "hostID": user.as_raw(), "size": 1 }]);
        linux["gidMappings"] = json!([{ "containerID": 0, "hostID": group.as_raw(), "size": 1 }]);
    }
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": work.words("/init", "/disk"),
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": { "bounding": rights, "effective": rights, "permitted": rights },
            "noNewPrivileges": true,
        },
        "root": { "path": site.root(), "readonly": false },
        "hostname": "vmm-bench",
        "mounts": mounts,
        "linux": linux,
    })
}

fn kernel(site: &Site) -> anyhow::Result<&Path> {
    site.kernel().map_err(|why| anyhow!("{why}"))
}

fn vmm(contender: &Contender, site: &Site, work: &Work, common: Common) -> anyhow::Result<Command> {
    let mut command = Command::new(&contender.program);
    command.arg("--kernel").arg(kernel(site)?).arg("--initrd").arg(site.initramfs(work.has_tools));
    command.arg("--mem").arg(format!("{}M", common.memory(work))).args(["--on-reboot", "exit"]);
    command.arg("--cmdline").arg(work.cmdline("poweroff"));
    if work.groups.is_empty() {
        command.arg("--boot-timer");
    }
    if work.has_disk {
        command.arg("--disk").arg(site.disk());
    }
    if work.network.is_some() {
        command.arg("--net").arg(format!("tap={TAP}"));
    }
    Ok(command)
}

fn qemu(contender: &Contender, site: &Site, work: &Work, common: Common) -> anyhow::Result<Command> {
    let mut command = Command::new(&contender.program);
    command.args(["-M", "microvm,pit=off,pic=off,rtc=off,x-option-roms=off", "-accel", "kvm", "-cpu", "host"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-smp", "1", "-m", &common.memory(work).to_string()]);
    command.arg("-kernel").arg(kernel(site)?).arg("-initrd").arg(site.initramfs(work.has_tools));
    command.arg("-append").arg(format!("reboot=t {SAME} {}", work.cmdline("reboot")));
    if work.has_disk {
        let disk = site.disk();
        command.arg("-drive").arg(format!("if=none,id=disk,format=raw,aio=io_uring,file={}", disk.display()));
        command.args(["-device", "virtio-blk-device,drive=disk"]);
    }
    if work.network.is_some() {
        let vhost = if Path::new("/dev/vhost-net").exists() { "on" } else { "off" };
        command.arg("-netdev").arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"));
        command.args(["-device", "virtio-net-device,netdev=net"]);
    }
    Ok(command)
}

fn firecracker(contender: &Contender, site: &Site, work: &Work, common: Common) -> anyhow::Result<Command> {
    let config = site.own(&contender.name)?.join("machine.json");
    let disk =
        json!({ "drive_id": "disk", "path_on_host": site.disk(), "is_root_device": false, "is_read_only": false });
    let card = json!({ "iface_id": "eth0", "host_dev_name": TAP });
    let network = if work.network.is_some() { vec![card] } else { Vec::new() };
    let machine = json!({
        "boot-source": {
            "kernel_image_path": site.vmlinux()?,
            "initrd_path": site.initramfs(work.has_tools),
            "boot_args": format!("reboot=k pci=off {SAME} {}", work.cmdline("reboot")),
        },
        "drives": if work.has_disk { vec![disk] } else { Vec::new() },
        "network-interfaces": network,
        "machine-config": { "vcpu_count": 1, "mem_size_mib": common.memory(work) },
    });
    fs::write(&config, machine.to_string()).context("cannot write the machine's configuration")?;
    let mut command = Command::new(&contender.program);
    command.args(["--no-api", "--config-file"]).arg(config);
    Ok(command)
}

fn cloud_hypervisor(contender: &Contender, site: &Site, work: &Work, common: Common) -> anyhow::Result<Command> {
    let mut command = Command::new(&contender.program);
    command.arg("--kernel").arg(site.vmlinux()?).arg("--initramfs").arg(site.initramfs(work.has_tools));
    command.arg("--memory").arg(format!("size={}M", common.memory(work))).args(["--cpus", "boot=1"]);
    command.args(["--serial", "tty", "--console", "off"]);
    command.arg("--cmdline").arg(format!("reboot=t {SAME} {}", work.cmdline("poweroff")));
    if work.has_disk {
        command.arg("--disk").arg(format!("path={}", site.disk().display()));
    }
    if work.network.is_some() {
        command.arg("--net").arg(format!("tap={TAP}"));
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_is_said_in_words_and_on_the_command_line_alike() {
        let work = Work { groups: vec!["cpu", "disk"], millis: 5, has_disk: true, ..Work::default() };
        assert_eq!(work.words("/init", "/disk"), ["/init", "work", "groups=cpu,disk", "millis=5", "disk=/disk"]);
        assert_eq!(
            work.cmdline("reboot"),
            "quiet loglevel=0 bench_groups=cpu,disk bench_millis=5 bench_disk=/dev/vda bench_end=reboot"
        );
        assert_eq!(Work::default().words("/init", "/disk"), ["/init", "work"]);
    }

    #[test]
    fn a_container_is_in_the_network_that_there_is_and_else_in_one_of_its_own() {
        let site = Site::make(None, false, &[]).unwrap();
        let network = |network| {
            let config = bundle_config(&site, &Work { network, ..Work::default() });
            let all = config["linux"]["namespaces"].as_array().unwrap().clone();
            all.into_iter().find(|namespace| namespace["type"] == "network").unwrap()
        };
        assert_eq!(network(None), json!({ "type": "network" }));
        assert_eq!(network(Some("/x".into())), json!({ "type": "network", "path": "/x" }));
    }

    #[test]
    fn tools_need_a_machine_with_room_for_them() {
        let common = Common { limit: Duration::ZERO, cpu: None, memory: 256 };
        let with = |has_tools| common.memory(&Work { has_tools, ..Work::default() });
        assert_eq!((with(false), with(true)), (256, 1024));
    }
}
