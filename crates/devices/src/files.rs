//! Which files of the host's the devices of a machine use, and how: for who keeps all others from it.

use std::path::{Path, PathBuf};

use crate::list::Devices;

/// The files of a machine by what is done with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Read, or for a folder all that is in it.
    pub read: Vec<PathBuf>,
    /// Read and written.
    pub written: Vec<PathBuf>,
    /// Made, renamed or removed as well.
    pub made: Vec<PathBuf>,
    /// Unix sockets that are made and removed.
    pub sockets: Vec<PathBuf>,
}

impl Devices {
    /// The files that are opened in this process. Shared folders are virtiofsd's.
    pub fn files(&self) -> Files {
        let mut files = Files::default();
        for disk in &self.disk {
            let of_disk = if disk.readonly || disk.overlay.is_some() { &mut files.read } else { &mut files.written };
            of_disk.push(disk.path.clone());
            files.made.extend(disk.overlay.clone());
            if disk.is_layered() {
                let own = || disk.path.parent().map(Path::to_owned);
                files.read.extend(disk.backing_folder.clone().or_else(own));
            }
        }
        for pmem in &self.pmem {
            let of_pmem = match (pmem.readonly, pmem.size) {
                (_, Some(_)) => &mut files.made,
                (true, None) => &mut files.read,
                (false, None) => &mut files.written,
            };
            of_pmem.push(pmem.path.clone());
        }
        if self.uses_host_interfaces() {
            files.written.extend(["/dev/net/tun", "/dev/vhost-net"].map(PathBuf::from));
            files.read.push("/sys/class/net".into());
        }
        files.sockets.extend(self.vsock.iter().map(|vsock| vsock.path.clone()));
        files
    }

    /// Whether they use interfaces of the host's network namespace.
    pub fn uses_host_interfaces(&self) -> bool {
        self.net.iter().any(|net| net.tap.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_with_an_overlay_is_only_read() {
        let disk = ["/a/disk,overlay=/b/over", "/c/plain", "/d/fixed,readonly", "/e/chain.qcow2,format=qcow2"];
        let disk = disk.map(|text| kv::from_str(text).unwrap()).to_vec();
        let files = Devices { disk, ..Devices::default() }.files();
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(files.read, paths(&["/a/disk", "/d/fixed", "/e"]));
        assert_eq!((files.written, files.made), (paths(&["/c/plain", "/e/chain.qcow2"]), paths(&["/b/over"])));
    }
}
