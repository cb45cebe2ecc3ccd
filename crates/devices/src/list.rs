//! The only list of devices: what can be asked for, under which name, and how it is made.
//!
//! Flags, file and API share it. A new device is a folder of its own, a field here, and its line in each method.

use std::collections::HashSet;
use std::iter;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use kv::help;
use memory::FileRegion;
use serde::{Deserialize, Serialize};
use virtio::VirtioDevice;
use virtio::transport::Handle;

use crate::Transport;
use crate::balloon::{Balloon, BalloonSpec};
use crate::block::{Block, BlockSpec};
use crate::control::Controls;
use crate::fs::{Fs, ShareSpec};
use crate::net::{Net, NetSpec};
use crate::pmem::{self, Pmem, PmemSpec};
use crate::rng::{Rng, RngSpec};
use crate::starter::{Launched, Starter};
use crate::vsock::{Vsock, VsockSpec};

/// The devices of one machine, as asked for. Each list can be as long as the machine has places.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", default)]
pub struct Devices {
    /// A disk (can be said again for another)
    #[arg(long, value_name = "PATH[,…]", value_parser = kv::from_str::<BlockSpec>, help_heading = "Devices")]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<BlockSpec>,

    /// A file as the guest's persistent memory (can be said again for another)
    #[arg(long, value_name = "PATH[,…]", value_parser = kv::from_str::<PmemSpec>, help_heading = "Devices")]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemSpec>,

    /// A network interface (can be said again for another)
    #[arg(long, value_name = "KIND[,…]", value_parser = kv::from_str::<NetSpec>, help_heading = "Devices")]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetSpec>,

    /// A source of random numbers
    #[arg(
        long,
        value_name = "KEYS",
        value_parser = kv::from_str::<RngSpec>,
        help_heading = "Devices",
        num_args = 0..=1,
        default_missing_value = ""
    )]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub rng: Vec<RngSpec>,

    /// Sockets between host and guest (`AF_VSOCK`), through Unix sockets of the host's
    #[arg(long, value_name = "PATH[,…]", value_parser = kv::from_str::<VsockSpec>, help_heading = "Devices")]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub vsock: Vec<VsockSpec>,

    /// A folder of the host's, for the guest to mount (can be said again for another)
    #[arg(long, value_name = "PATH,tag=…", value_parser = kv::from_str::<ShareSpec>, help_heading = "Devices")]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub share: Vec<ShareSpec>,

    /// Memory that the guest gives back
    #[arg(
        long,
        value_name = "SIZE[,…]",
        value_parser = kv::from_str::<BalloonSpec>,
        help_heading = "Devices",
        num_args = 0..=1,
        default_missing_value = ""
    )]
    #[serde(deserialize_with = "kv::texts_or_tables", skip_serializing_if = "Vec::is_empty")]
    pub balloon: Vec<BalloonSpec>,
}

/// Starts a helper.
pub(crate) type Launch<'a> = Box<dyn Fn() -> anyhow::Result<Launched> + 'a>;

/// A machine that devices are attached to.
pub trait Attach {
    /// Attaches a device, in the machine's own way unless `transport` is another; `name` is what the log calls it. Gives the
    /// way to it.
    ///
    /// # Errors
    ///
    /// The machine has no place for it.
    fn attach<D: VirtioDevice>(
        &mut self,
        name: String,
        transport: Option<Transport>,
        device: D,
    ) -> anyhow::Result<Handle<D>>;

    /// Makes a file the guest's memory, and returns its guest-physical address.
    ///
    /// # Errors
    ///
    /// The machine has no room for it.
    fn place(&mut self, file: Arc<FileRegion>) -> anyhow::Result<u64>;
}

impl Devices {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These devices laid over `other`: one with the same id replaces the other, the rest come after.
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        Self {
            disk: merge(self.disk, other.disk, |spec| spec.id.as_deref()),
            pmem: merge(self.pmem, other.pmem, |spec| spec.id.as_deref()),
            net: merge(self.net, other.net, |spec| spec.id.as_deref()),
            rng: merge(self.rng, other.rng, |spec| spec.id.as_deref()),
            vsock: merge(self.vsock, other.vsock, |spec| spec.id.as_deref()),
            share: merge(self.share, other.share, |spec| Some(spec.id())),
            balloon: merge(self.balloon, other.balloon, |spec| spec.id.as_deref()),
        }
    }

    /// The paths of the files that the devices are to use.
    pub fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let disks = self.disk.iter_mut().flat_map(|disk| {
            [Some(&mut disk.path), disk.overlay.as_mut(), disk.backing_folder.as_mut()].into_iter().flatten()
        });
        let pmems = self.pmem.iter_mut().map(|pmem| &mut pmem.path);
        let sockets = self.vsock.iter_mut().map(|vsock| &mut vsock.path);
        let peers = self.net.iter_mut().filter_map(|net| net.vhost_user.as_mut());
        disks.chain(pmems).chain(sockets).chain(peers).chain(self.share.iter_mut().map(|share| &mut share.path))
    }

    /// The devices with helpers, by their names, and what starts those.
    pub(crate) fn helpers(&self) -> Vec<(String, Launch<'_>)> {
        let nets = self.net.iter().filter(|net| net.is_user());
        let nets = nets.map(|net| (net.id(), Box::new(|| Net::launch(net)) as Launch<'_>));
        let shares =
            self.share.iter().map(|share| (share.id().to_owned(), Box::new(|| Fs::launch(share)) as Launch<'_>));
        nets.chain(shares).collect()
    }

    /// Whether other processes have to map the guest's memory.
    pub fn share_memory(&self) -> bool {
        !self.share.is_empty() || self.net.iter().any(|net| net.vhost_user.is_some())
    }

    /// These devices, each with a name of its own: the one that was said, or that of its kind or file, with a number
    /// behind it where another has that already.
    ///
    /// # Errors
    ///
    /// Two were given the same.
    pub fn named(&self) -> anyhow::Result<Self> {
        let mut devices = self.clone();
        let mut names = devices.names();
        let mut taken = HashSet::new();
        let said = names.iter().filter_map(|(id, _)| id.as_ref());
        if let Some(id) = said.into_iter().find(|id| !taken.insert((*id).clone())) {
            bail!("Two devices are called {id}: give one of them another name with id=NAME");
        }
        for (id, name) in names.iter_mut().filter(|(id, _)| id.is_none()) {
            let numbered = (2..).map(|number| format!("{name}-{number}"));
            **id = iter::once(name.clone()).chain(numbered).find(|name| taken.insert(name.clone()));
        }
        Ok(devices)
    }

    /// For each device the name that was said, and the one that it has otherwise.
    fn names(&mut self) -> Vec<(&mut Option<String>, String)> {
        fn of<T>(
            specs: &mut [T],
            name: impl Fn(&mut T) -> (String, &mut Option<String>),
        ) -> Vec<(&mut Option<String>, String)> {
            specs.iter_mut().map(name).map(|(name, id)| (id, name)).collect()
        }
        let Self { disk, pmem, net, rng, vsock, share, balloon } = self;
        let mut names = of(disk, |spec| (spec.id(), &mut spec.id));
        names.extend(of(pmem, |spec| (spec.id(), &mut spec.id)));
        names.extend(of(net, |spec| (spec.id(), &mut spec.id)));
        names.extend(of(rng, |spec| (spec.id().to_owned(), &mut spec.id)));
        names.extend(of(vsock, |spec| (spec.id().to_owned(), &mut spec.id)));
        names.extend(of(share, |spec| (spec.id().to_owned(), &mut spec.id)));
        names.extend(of(balloon, |spec| (spec.id().to_owned(), &mut spec.id)));
        names
    }

    /// Makes the devices and attaches them, in the order of this list. `vm` is the machine's name; `starter` starts their
    /// helpers, where it is not this process that does. Gives what they can be reached by.
    ///
    /// # Errors
    ///
    /// What was asked for cannot be had; two were given the same name; the machine has no place for one.
    pub fn attach(
        &self,
        vm: Option<&str>,
        starter: Option<&Starter>,
        to: &mut impl Attach,
    ) -> anyhow::Result<Controls> {
        let devices = self.named()?;
        let mut controls = Controls::default();
        for spec in &devices.disk {
            let device = Block::open(spec)?;
            let handle = to.attach(format!("disk {}", device.id()), spec.transport, device)?;
            controls.disks.push((spec.id(), handle));
        }
        for spec in &devices.pmem {
            let file = Arc::new(pmem::open(spec)?);
            let address = to.place(file.clone())?;
            to.attach(format!("pmem {}", spec.id()), spec.transport, Pmem::new(file, address))?;
        }
        for spec in &devices.net {
            let device = Net::open(spec, vm, starter)?;
            to.attach(format!("net {}", device.id()), spec.transport, device)?;
        }
        for spec in &devices.rng {
            to.attach(spec.id().to_owned(), spec.transport, Rng::new(spec)?)?;
        }
        for spec in &devices.vsock {
            to.attach(spec.id().to_owned(), spec.transport, Vsock::new(spec)?)?;
        }
        let mut tags = HashSet::new();
        if let Some(share) = devices.share.iter().find(|share| !tags.insert(&share.tag)) {
            bail!("Two shared folders have tag={}: a guest could mount only one of them, say another", share.tag);
        }
        for spec in &devices.share {
            let device = Fs::open(spec, starter)?;
            to.attach(format!("share {}", device.id()), spec.transport, device)?;
        }
        for spec in &devices.balloon {
            let handle = to.attach(spec.id().to_owned(), spec.transport, Balloon::new(spec)?)?;
            controls.balloons.push((spec.id().to_owned(), handle));
        }
        Ok(controls)
    }

    /// The keys of each flag, for its help.
    pub fn keys() -> [(&'static str, String); 7] {
        [
            ("disk", help::keys::<BlockSpec>()),
            ("pmem", help::keys::<PmemSpec>()),
            ("net", help::keys::<NetSpec>()),
            ("rng", help::keys::<RngSpec>()),
            ("vsock", help::keys::<VsockSpec>()),
            ("share", help::keys::<ShareSpec>()),
            ("balloon", help::keys::<BalloonSpec>()),
        ]
    }
}

/// `ours` over `theirs`, of which those go that have the id of one of ours.
fn merge<T>(ours: Vec<T>, mut theirs: Vec<T>, id: impl Fn(&T) -> Option<&str>) -> Vec<T> {
    theirs.retain(|their| id(their).is_none_or(|their| ours.iter().all(|our| id(our) != Some(their))));
    theirs.extend(ours);
    theirs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_name_of_its_own() {
        let disk = ["/a/root.img", "/b/root.raw", "c.img,id=root-2", "/d/root"].map(|text| kv::from_str(text).unwrap());
        let net = ["user", "user"].map(|text| kv::from_str(text).unwrap());
        let devices = Devices { disk: disk.to_vec(), net: net.to_vec(), ..Devices::default() };
        let names: Vec<String> = devices.named().unwrap().names().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["root", "root-3", "root-2", "root-4", "user", "user-2"]);
    }

    #[test]
    fn a_name_that_was_given_twice_is_refused() {
        let rng = vec![kv::from_str("id=root").unwrap()];
        let devices = Devices { disk: vec![kv::from_str("a,id=root").unwrap()], rng, ..Devices::default() };
        assert!(devices.named().unwrap_err().to_string().contains("called root"));
    }

    #[test]
    fn a_device_replaces_the_one_with_its_id_and_another_comes_after() {
        let disks = |texts: &[&str]| {
            let disk = texts.iter().map(|text| kv::from_str(text).unwrap()).collect();
            Devices { disk, ..Devices::default() }
        };
        let file = disks(&["a.img,id=root", "b.img"]);
        let flags = disks(&["c.img,id=root", "d.img"]);
        assert_eq!(flags.over(file), disks(&["b.img", "c.img,id=root", "d.img"]));
    }
}
