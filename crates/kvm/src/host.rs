//! `/dev/kvm`: opened, and checked for what this program cannot do without.

use std::io;
use std::path::{Path, PathBuf};

use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, Kvm};

/// The KVM API version that every kernel since 2.6.22 has.
const API_VERSION: i32 = 12;

/// The capabilities that a machine is built on, with their names in the KVM API.
pub(crate) const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// A host on which no machine can be made.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no such device.
    #[error(
        "{0} does not exist: load the module kvm_intel or kvm_amd, turn virtualisation on in the \
         firmware, or in the outer machine's settings where this is a virtual machine itself"
    )]
    Missing(PathBuf),
    /// The device is there and closed to this user.
    #[error("{0} may not be opened by this user: join its group, `sudo usermod -aG kvm $USER`, and log in again")]
    Denied(PathBuf),
    /// The device does not open for another reason.
    #[error("{path} does not open: {source}")]
    Unusable {
        /// The device.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It opens and is something else.
    #[error("{0} does not speak version 12 of the KVM API: it is not KVM's device")]
    NotKvm(PathBuf),
    /// It is KVM without something that is needed.
    #[error("KVM on this host lacks {0}, which every machine needs: run Linux 5.10 or later on the host")]
    Lacks(&'static str),
}

/// `/dev/kvm`, opened.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Where KVM's device is.
    pub const DEVICE: &str = "/dev/kvm";

    /// Opens KVM's device at `path` and checks it.
    pub fn open(path: &Path) -> Result<Self, HostError> {
        let owned = || path.to_path_buf();
        let name =
            std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| HostError::Missing(owned()))?;
        let kvm = Kvm::new_with_path(&name).map_err(|error| {
            let source = io::Error::from_raw_os_error(error.errno());
            match source.kind() {
                io::ErrorKind::NotFound => HostError::Missing(owned()),
                io::ErrorKind::PermissionDenied => HostError::Denied(owned()),
                _ => HostError::Unusable { path: owned(), source },
            }
        })?;
        if kvm.get_api_version() != API_VERSION {
            return Err(HostError::NotKvm(owned()));
        }
        match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            Some((_, name)) => Err(HostError::Lacks(name)),
            None => Ok(Self { kvm }),
        }
    }

    /// The device itself, for what only this crate does.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// What KVM can show a guest of the processor (`KVM_GET_SUPPORTED_CPUID`).
    pub fn supported_cpuid(&self) -> anyhow::Result<CpuId> {
        let entries = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
        self.kvm
            .get_supported_cpuid(entries)
            .map_err(|error| anyhow::anyhow!("KVM does not say which processor features it supports: {error}"))
    }

    /// Whether the local APIC's timer can be programmed in TSC cycles.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// The most virtual processors that a machine can have.
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// Bits of a guest-physical address, as the guest will see them.
    pub fn address_bits(&self) -> anyhow::Result<u8> {
        const ADDRESS_SIZES: u32 = 0x8000_0008;
        let cpuid = self.supported_cpuid()?;
        let leaf = cpuid.as_slice().iter().find(|entry| entry.function == ADDRESS_SIZES);
        // A processor without that leaf has the 36 bits of the first with long addresses.
        Ok(leaf.map_or(36, |entry| entry.eax.to_le_bytes()[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named_with_its_cure() {
        let error = Host::open(Path::new("/dev/no-such-kvm")).unwrap_err().to_string();
        assert!(error.contains("/dev/no-such-kvm") && error.contains("kvm_amd"), "{error}");
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let error = Host::open(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, HostError::NotKvm(_)), "{error}");
    }
}
