//! What a run comes to: the machine, what its agent is to set up, and the command.

use std::env;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use boot::KernelSpec;
use devices::Devices;
use devices::block::{BlockSpec, Format};
use devices::console::SerialSpec;
use devices::fs::{Cache, ShareSpec};
use devices::net::{NetSpec, Publish};
use devices::vsock::VsockSpec;
use guest::initramfs::Archive;
use guest::request::{Address, Exec, Interface, Mount, MountFlag, Program, Setup};
use machine::{CpusSpec, OnEnd, VmConfig};
use memory::MemorySpec;
use rustix::fs::{MemfdFlags, OFlags, memfd_create, open};
use rustix::io::Errno;
use sandbox::Mode;
use session::{Folder, Record, Variable, environment, terminal_size};

use super::image::Config;
use super::{image, kernel, modules, userland};

/// The guest's PID 1, which `build.rs` has built.
static AGENT: &[u8] = include_bytes!(env!("VMM_AGENT"));

/// Major and minor number of `/dev/console`.
const CONSOLE: (u32, u32) = (5, 1);
/// The guest's address, in a network of its own.
const ADDRESS: &str = "10.0.2.15/24";
/// The guest's only disk, if it has one.
const DISK: &str = "/dev/vda";
/// The folder that a rootfs is mounted to, before it is the root.
const NEW_ROOT: &str = "/newroot";

/// A command in a machine of its own, as it is asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct RunSpec {
    /// The kernel; unless said, the one that vmm kernel install has put into the data folder, or else the host's own
    #[arg(long, value_name = "PATH", value_parser = kv::from_str::<KernelSpec>)]
    kernel: Option<KernelSpec>,
    /// A folder that is the guest's root instead of the host's own programs; what is written there is thrown away
    #[arg(long, value_name = "DIR", group = "root")]
    rootfs: Option<PathBuf>,
    /// A container image that is the guest's root, and says what runs unless you do: HOST/NAME[:TAG], or ./PATH of an OCI
    /// layout or an archive; what is written there is thrown away
    #[arg(long, value_name = "REFERENCE", group = "root")]
    image: Option<String>,
    /// A disk whose file system is the guest's root (ext4 if it is qcow2); with readonly, what is written is thrown away
    #[arg(long, value_name = "PATH[,…]", value_parser = kv::from_str::<BlockSpec>, group = "root")]
    disk: Option<BlockSpec>,
    /// A further disk, which the guest has after that of its root (can be said again for another)
    #[arg(long = "extra-disk", value_name = "PATH[,…]", value_parser = kv::from_str::<BlockSpec>)]
    extra_disks: Vec<BlockSpec>,
    /// A program in place of the image's entry point
    #[arg(long, value_name = "PROGRAM", requires = "image")]
    entrypoint: Option<String>,
    /// A folder of the host's that the guest has too (can be said again for another)
    #[arg(short, long = "volume", value_name = "HOST:GUEST[:ro]")]
    volumes: Vec<Volume>,
    /// A variable of the command's environment; without a value, the one that it has here (can be said again)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<Variable>,
    /// The folder that the command starts in
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Whom the command runs as in the guest; root unless said
    #[arg(short, long, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// What the guest reaches: user (what this host reaches, through passt, but not this host's own 127.0.0.1) or none
    #[arg(long, value_name = "user|none")]
    network: Option<Network>,
    /// A network card of another kind in its place, such as tap0,address=10.1.0.5/16: of that network number 2 is the
    /// gateway and number 3 knows names
    #[arg(long, value_name = "SPEC", value_parser = kv::from_str::<NetSpec>, conflicts_with_all = ["network", "publish"])]
    net: Option<NetSpec>,
    /// A port of this host that leads to the guest; at 127.0.0.1 unless another address is said (can be said again)
    #[arg(short, long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    publish: Vec<Publish>,
    /// RAM, 512M unless said
    #[arg(long, value_name = "SIZE[,…]", value_parser = kv::from_str::<MemorySpec>)]
    mem: Option<MemorySpec>,
    /// Processors, 1 unless said
    #[arg(long, value_name = "N[,…]", value_parser = kv::from_str::<CpusSpec>)]
    cpus: Option<CpusSpec>,
    /// The machine's name, by which other commands know it, and its host name
    #[arg(long)]
    name: Option<String>,
    /// Print the machine's name when the command runs, and leave it running: see vmm ps, logs, exec, stop
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub(super) detach: bool,
    /// Leave nothing of a detached machine when it has ended
    #[arg(long)]
    pub(super) rm: bool,
    /// This is the process of a detached machine
    #[arg(long, hide = true)]
    pub(super) behind: bool,
    /// The starter keeps there what the command writes
    #[arg(long, hide = true)]
    output_at: Option<PathBuf>,
    /// How strictly the process is confined
    #[arg(long, value_name = "on|strict|report|off", default_value = "on", hide_possible_values = true)]
    sandbox: Mode,
    /// The command and its arguments; an image may have its own
    #[arg(required_unless_present = "image", last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What a guest reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Network {
    /// What the host reaches.
    User,
    /// Nothing.
    None,
}

/// A folder of the host's and where the guest has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    host: PathBuf,
    guest: String,
    readonly: bool,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, guest, readonly) = match text.split(':').collect::<Vec<_>>()[..] {
            [host, guest] | [host, guest, "rw"] => (host, guest, false),
            [host, guest, "ro"] => (host, guest, true),
            _ => return Err("say HOST:GUEST or HOST:GUEST:ro".into()),
        };
        if host.is_empty() || !guest.starts_with('/') {
            return Err("the guest's folder begins with a slash: say HOST:/GUEST".into());
        }
        Ok(Self { host: host.into(), guest: guest.into(), readonly })
    }
}

/// What a run comes to.
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) machine: VmConfig,
    pub(crate) setup: Setup,
    pub(crate) exec: Exec,
    pub(crate) folder: Folder,
    pub(crate) sandbox: Mode,
    /// The machine's initramfs, which its configuration names by its descriptor.
    _initramfs: File,
}

impl Plan {
    /// Makes the plan: reads what it is made of and starts nothing.
    pub(crate) fn of(spec: &RunSpec) -> anyhow::Result<Self> {
        let mut root = Root::of(spec)?;
        let exec = exec(spec, &root)?;
        let net = network(spec)?;
        let kernel = spec.kernel.clone().map_or_else(kernel::unless_said, Ok)?;
        let card = net.is_some().then_some("virtio_net");
        let disk = (root.disk.is_some() || !spec.extra_disks.is_empty()).then_some("virtio_blk");
        modules::add(&mut root.archive, &kernel, card.into_iter().chain(disk).chain(root.file_system))?;
        let initramfs = File::from(memfd_create("initramfs", MemfdFlags::CLOEXEC).context("cannot make a memfd")?);
        (&initramfs).write_all(&root.archive.finish()?).context("cannot write the initramfs")?;

        let name = spec.name.clone().unwrap_or_else(|| Record::name_for(&exec.program.argv));
        let folder = Folder::new(&name)?;
        folder.describe(&record(spec, &name, &exec))?;
        let vsock = VsockSpec { path: folder.files().vsock(), ..VsockSpec::default() };
        let machine = VmConfig {
            kernel: Some(kernel),
            mem: spec.mem.clone(),
            cpus: spec.cpus.clone(),
            initrd: Some(PathBuf::from(format!("/proc/self/fd/{}", initramfs.as_raw_fd()))),
            cmdline: Some("quiet".to_owned().into()),
            serial: Some(kv::from_str::<SerialSpec>(&format!("file,path={}", folder.files().console().display()))?),
            devices: Devices {
                disk: root.disk.into_iter().chain(spec.extra_disks.iter().cloned()).collect(),
                share: root.shares,
                vsock: vec![vsock],
                net: net.clone().into_iter().collect(),
                ..Devices::default()
            },
            name: spec.name.clone(),
            on_reboot: Some(OnEnd::Exit),
            on_panic: Some(OnEnd::Exit),
            ..VmConfig::default()
        };
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let setup = Setup {
            hostname: name.clone(),
            mounts: root.mounts,
            interfaces: net.iter().filter_map(interface).collect(),
            nameservers: net.iter().filter_map(|net| Some(net.address?.dns().into())).collect(),
            clock: u64::try_from(clock).unwrap_or_default(),
            ..Setup::default()
        };
        Ok(Self { name, machine, setup, exec, folder, sandbox: spec.sandbox, _initramfs: initramfs })
    }
}

/// The command.
fn exec(spec: &RunSpec, root: &Root) -> anyhow::Result<Exec> {
    let terminal =
        if spec.tty { Some(terminal_size().context("the input is no terminal: leave out --tty")?) } else { None };
    // Container tools take what is empty for what is not said.
    let said = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let program = Program {
        argv: root.config.argv(spec.entrypoint.as_deref(), &spec.command)?,
        env: environment(root.config.env(), &spec.env, spec.tty),
        cwd: spec.workdir.clone().or_else(|| root.workdir.clone()).or_else(|| said(&root.config.working_dir)),
        user: spec.user.clone().or_else(|| said(&root.config.user)),
    };
    Ok(Exec { program, terminal, stdin: spec.interactive })
}

/// The network card, if there is to be one. Without a word, that is where this host has a network itself.
fn network(spec: &RunSpec) -> anyhow::Result<Option<NetSpec>> {
    if let Some(net) = &spec.net {
        return Ok(Some(net.clone()));
    }
    let wanted = spec.network.unwrap_or_else(|| match spec.publish.is_empty() && !host_has_route() {
        true => Network::None,
        false => Network::User,
    });
    if wanted == Network::None {
        ensure!(spec.publish.is_empty(), "--publish needs a network: leave out --network none");
        return Ok(None);
    }
    let address = Some(ADDRESS.parse()?);
    Ok(Some(NetSpec { user: true, address, publish: spec.publish.clone(), ..NetSpec::default() }))
}

/// Whether this host has a default route for IPv4 (`/proc/net/route`: the second column is the destination).
fn host_has_route() -> bool {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    routes.lines().skip(1).any(|line| line.split_whitespace().nth(1) == Some("00000000"))
}

/// The card as the agent sets it up: the host knows what it gave, so nobody has to ask.
fn interface(net: &NetSpec) -> Option<Interface> {
    let address = net.address?;
    Some(Interface {
        name: "eth0".to_owned(),
        addresses: vec![Address { ip: address.address().into(), prefix: address.prefix() }],
        gateways: vec![address.gateway().into()],
    })
}

/// What is known of the machine by its name.
fn record(spec: &RunSpec, name: &str, exec: &Exec) -> Record {
    let root = match spec {
        RunSpec { rootfs: Some(path), .. } => path.display().to_string(),
        RunSpec { image: Some(reference), .. } => reference.clone(),
        RunSpec { disk: Some(disk), .. } => disk.path.display().to_string(),
        _ => "host".to_owned(),
    };
    let ports = spec.publish.iter().map(ToString::to_string).collect();
    let record = Record::now(name.to_owned(), exec.program.argv.clone(), root, ports);
    Record { output: spec.output_at.clone(), ..record }
}

/// The guest's root in the making.
#[derive(Default)]
struct Root {
    archive: Archive,
    shares: Vec<ShareSpec>,
    /// The only disk, and what its file system is.
    disk: Option<BlockSpec>,
    file_system: Option<&'static str>,
    mounts: Vec<Mount>,
    /// What an image says of its command.
    config: Config,
    /// Where the command starts unless it says so itself.
    workdir: Option<String>,
}

impl Root {
    /// The root that is asked for, with the volumes in it.
    fn of(spec: &RunSpec) -> anyhow::Result<Self> {
        let mut root = Self::default();
        root.archive.file("init", 0o755, AGENT)?;
        root.archive.character_device("dev/console", CONSOLE.0, CONSOLE.1)?;
        let mut above = NEW_ROOT;
        match spec {
            RunSpec { rootfs: Some(path), .. } => {
                root.mount("upper", "/upper", "tmpfs", "mode=755");
                root.layered(path, "root", NEW_ROOT);
            }
            RunSpec { image: Some(reference), .. } => root.of_image(reference)?,
            RunSpec { disk: Some(disk), .. } => root.of_disk(disk)?,
            _ => {
                root.of_host(spec)?;
                above = "";
            }
        }
        for volume in &spec.volumes {
            root.share(&volume.host, &format!("{above}{}", volume.guest), volume.readonly);
        }
        Ok(root)
    }

    /// A container image under a throw-away layer.
    fn of_image(&mut self, reference: &str) -> anyhow::Result<()> {
        let image::Image { path, config, .. } = image::get(reference)?;
        self.config = config;
        self.disk_below("squashfs");
        self.file_system = Some("squashfs");
        self.disk = Some(BlockSpec { path, readonly: true, ..BlockSpec::default() });
        Ok(())
    }

    /// The file system of a disk, under a throw-away layer if the guest cannot write to it.
    fn of_disk(&mut self, disk: &BlockSpec) -> anyhow::Result<()> {
        let file_system = if disk.format == Some(Format::Qcow2) { "ext4" } else { image::file_system(&disk.path)? };
        if disk.readonly {
            self.disk_below(file_system);
        } else {
            self.mount(DISK, NEW_ROOT, file_system, "");
        }
        self.disk = Some(disk.clone());
        self.file_system = Some(file_system);
        Ok(())
    }

    /// The disk's file system, which cannot be changed, with what the guest writes on top.
    fn disk_below(&mut self, file_system: &str) {
        self.mount("upper", "/upper", "tmpfs", "mode=755");
        self.mount(DISK, "/lower/root", file_system, "");
        if let Some(mount) = self.mounts.last_mut() {
            mount.flags.push(MountFlag::Ro);
        }
        self.overlay("root", NEW_ROOT);
    }

    /// The host's own programs, and the folder that we are in.
    fn of_host(&mut self, spec: &RunSpec) -> anyhow::Result<()> {
        for name in ["home", "mnt", "root", "srv", "var/lib", "var/log"] {
            self.archive.directory(name)?;
        }
        self.archive.symlink("var/run", "/run")?;
        self.archive.symlink("var/tmp", "/tmp")?;
        userland::etc(&mut self.archive)?;
        self.mount("upper", "/upper", "tmpfs", "mode=755");
        self.mount("tmp", "/tmp", "tmpfs", "mode=1777");
        for name in userland::folders(&mut self.archive)? {
            let (path, target) = (Path::new("/").join(name), format!("/{name}"));
            // The guest's overlayfs opens with O_NOATIME, and virtiofsd may no more than we: an ordinary user's guest cannot
            // write there.
            let flags = OFlags::NOATIME | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match open(&path, flags, rustix::fs::Mode::empty()) {
                Err(Errno::PERM) => self.share(&path, &target, true),
                _ => self.layered(&path, name, &target),
            }
        }
        if spec.workdir.is_none() {
            let here = env::current_dir().context("cannot find the current folder")?;
            let told = spec.volumes.iter().any(|volume| volume.host == here);
            if !told {
                refuse_home(&here)?;
                let place = here.to_str().with_context(|| format!("{} is not UTF-8: say --workdir", here.display()))?;
                self.share(&here, place, false);
            }
            self.workdir = here.to_str().map(str::to_owned);
        }
        Ok(())
    }

    /// A folder that the guest cannot change, with what it writes on top.
    fn layered(&mut self, path: &Path, tag: &str, target: &str) {
        self.shares.push(ShareSpec {
            path: path.to_owned(),
            tag: tag.to_owned(),
            readonly: true,
            cache: Cache::Always,
            ..ShareSpec::default()
        });
        self.mount(tag, &format!("/lower/{tag}"), "virtiofs", "");
        self.overlay(tag, target);
    }

    /// What is mounted below, with what the guest writes on top.
    fn overlay(&mut self, tag: &str, target: &str) {
        let layers = format!("lowerdir=/lower/{tag},upperdir=/upper/{tag},workdir=/upper/.{tag}");
        self.mount("overlay", target, "overlay", &layers);
    }

    /// A folder of the host's at `target`.
    fn share(&mut self, path: &Path, target: &str, readonly: bool) {
        let tag = format!("volume{}", self.shares.len());
        self.shares.push(ShareSpec { path: path.to_owned(), tag: tag.clone(), readonly, ..ShareSpec::default() });
        self.mount(&tag, target, "virtiofs", "");
        if let Some(mount) = self.mounts.last_mut().filter(|_| readonly) {
            mount.flags.push(MountFlag::Ro);
        }
    }

    fn mount(&mut self, source: &str, target: &str, fstype: &str, data: &str) {
        self.mounts.push(Mount {
            source: source.to_owned(),
            target: target.to_owned(),
            fstype: fstype.to_owned(),
            flags: Vec::new(),
            data: data.to_owned(),
        });
    }
}

/// Nobody means to give a guest all of a home by the way.
fn refuse_home(here: &Path) -> anyhow::Result<()> {
    let homes = env::var_os("HOME").map(PathBuf::from).into_iter().chain(["/".into(), "/root".into(), "/home".into()]);
    let holds_home = homes.into_iter().any(|home| home.starts_with(here));
    if holds_home {
        let here = here.display();
        bail!(
            "the guest would have {here}, which is or holds a home: change to the folder that the command needs, or say \
             --volume {here}:{here}, or --workdir DIR for none"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_says_both_folders_and_whether_it_is_read_only() {
        let volume = |readonly| Volume { host: "/srv".into(), guest: "/data".into(), readonly };
        assert_eq!("/srv:/data".parse(), Ok(volume(false)));
        assert_eq!("/srv:/data:ro".parse(), Ok(volume(true)));
        for wrong in ["", "/srv", "/srv:data", ":/data", "/srv:/data:no", "/srv:/data:ro:x"] {
            assert!(wrong.parse::<Volume>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn homes_and_what_holds_them_are_not_shared_by_the_way() {
        for home in ["/", "/home", "/root"] {
            let error = refuse_home(Path::new(home)).unwrap_err().to_string();
            assert!(error.contains("--volume") && error.contains("--workdir"), "{error}");
        }
        refuse_home(Path::new("/srv/project")).unwrap();
    }
}
