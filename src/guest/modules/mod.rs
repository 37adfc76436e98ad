//! Finds the kernel modules that a guest needs, in the order in which they can be loaded.
//!
//! A distribution's kernel comes with a tree of modules, `/lib/modules/VERSION`, and its package's scripts make an index
//! of them (depmod(8)): `modules.dep` has a line for each module with all that it needs, `modules.builtin` lists what the
//! kernel has inside, `modules.softdep` and `modules.alias` tell what a module asks for while it runs. A tree that
//! was only unpacked has no `modules.dep`; the modules themselves say what they need, in their section `.modinfo`.

mod cache;
mod file;
mod tree;
mod version;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub use tree::Tree;
pub use version::{kernel_version, takes_modules};

/// Something that a guest is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// virtio-console ports.
    Console,
    /// virtio-fs shares.
    Fs,
    /// Overlays.
    Overlay,
    /// virtio-blk disks with a file system of this type.
    Block(String),
    /// virtio-net, and what a DHCP client needs.
    Net,
    /// virtio-vsock.
    Vsock,
    /// virtio-balloon.
    Balloon,
    /// virtio-rng.
    Rng,
    /// Persistent memory: virtio-pmem.
    Pmem,
}

impl Need {
    /// The modules for it, and whether the guest can do without each.
    fn modules(&self) -> Vec<(&str, bool)> {
        const NEEDED: bool = false;
        const OPTIONAL: bool = true;
        match self {
            Need::Console => vec![("virtio_console", NEEDED)],
            Need::Fs => vec![("virtiofs", NEEDED)],
            Need::Overlay => vec![("overlay", NEEDED)],
            Need::Block(kind) => vec![("virtio_blk", NEEDED), (kind, NEEDED)],
            // Packet sockets are a module of their own in few kernels.
            Need::Net => vec![("virtio_net", NEEDED), ("af_packet", OPTIONAL)],
            Need::Vsock => vec![("vmw_vsock_virtio_transport", NEEDED)],
            Need::Balloon => vec![("virtio_balloon", NEEDED)],
            Need::Rng => vec![("virtio_rng", NEEDED)],
            Need::Pmem => vec![("virtio_pmem", NEEDED), ("nd_pmem", NEEDED)],
        }
    }
}

/// A module, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores and without `.ko`.
    pub name: String,
    /// The ELF object, unpacked.
    pub bytes: Vec<u8>,
}

/// The modules for `needs` of the kernel `image`, which is in the file `kernel`; `given` is where the user says they are.
/// None at all, if this kernel takes no modules: then it has inside what it has.
///
/// # Errors
/// When there are modules and they cannot be had.
pub fn load(
    image: &[u8],
    kernel: &Path,
    given: Option<&Path>,
    needs: &[Need],
) -> Result<Vec<Module>, Error> {
    let version = kernel_version(image).ok_or_else(|| Error::NoVersion {
        kernel: kernel.to_owned(),
    })?;
    match Tree::find(&version, given, kernel) {
        Ok(tree) => tree.load(needs),
        Err(Error::NoTree { .. }) if !takes_modules(image, &version) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Why a kernel's modules cannot be had: a sentence that names the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{kernel} does not say which version of Linux it is, so its modules cannot be found; use a Linux bzImage or \
         vmlinux"
    )]
    NoVersion { kernel: PathBuf },
    #[error(
        "the modules of kernel {version} are not in {looked}; install its package, or name the directory that has \
         them with --modules"
    )]
    NoTree { version: String, looked: String },
    #[error(
        "{directory} has no modules of kernel {version}; --modules takes a directory with modules.dep or kernel/ in it, \
         or one with lib/modules/{version}"
    )]
    NotATree { version: String, directory: PathBuf },
    #[error(
        "kernel {version} has no module {module}, neither built in nor in {directory}; use a kernel that has it, or \
         name a directory that does with --modules"
    )]
    NoModule {
        version: String,
        module: String,
        directory: PathBuf,
    },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the module {path} is damaged: {why}; install the kernel's package anew")]
    Damaged { path: PathBuf, why: String },
}
