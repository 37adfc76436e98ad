//! A tap: a network interface of the host whose wire is a file (Documentation/networking/tuntap.rst of Linux).
//!
//! What the host sends out of the interface, this process reads, one frame a read; what it writes, the host receives.
//! With `IFF_VNET_HDR` each frame has a virtio-net header before it, in both directions, so the host's stack hands over
//! TCP packets of up to 64 KiB uncut and without checksums if the guest can take them, and takes such from the guest.
//! With `IFF_MULTI_QUEUE` the same interface is opened once for each pair of queues, and the host spreads its flows.

use std::ffi::{c_int, c_short, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::{Error, HEADER_LEN, NetBackend, Offloads, Piece, Sent, memory};
use crate::mem::GuestRam;

/// The longest name of a network interface, in bytes: `IFNAMSIZ` less the final zero.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;
/// The most pairs of queues of one card.
pub const QUEUES_MAX: u16 = 16;

/// A tap, or one that was made for us. One that we made goes away when the last descriptor is closed.
pub struct Tap {
    name: String,
    /// One for each pair of queues; the host gives frames to the first `used`.
    files: Vec<Arc<OwnedFd>>,
    used: u16,
    offloads: Offloads,
}

/// Whether `name` can be the name of an interface.
///
/// # Errors
/// One sentence that says what is wrong with it.
pub fn check_name(name: &str) -> Result<(), Error> {
    let wrong = if name.is_empty() {
        "give the name of a tap".to_owned()
    } else if name.len() > NAME_MAX {
        format!("`{name}` is too long: the name of an interface has at most {NAME_MAX} characters")
    } else if name == "."
        || name == ".."
        || name.contains(|c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c))
    {
        format!("`{name}` cannot be the name of an interface: use letters, digits, - and _")
    } else {
        return Ok(());
    };
    Err(Error::TapName(wrong))
}

impl Tap {
    /// Opens the tap `name` with so many pairs of queues, 1 to [`QUEUES_MAX`]; makes it if there is none, which needs
    /// `CAP_NET_ADMIN`.
    ///
    /// # Errors
    /// One sentence that names the tap, what is wrong and what to do.
    pub fn open(name: &str, queues: u16) -> Result<Tap, Error> {
        check_name(name)?;
        let failed = |what| {
            let name = name.to_owned();
            move |source| Error::Tap { name, what, source }
        };
        let mut files = Vec::new();
        for _ in 0..queues.clamp(1, QUEUES_MAX) {
            let file = attach(name, queues > 1)?;
            let mut header = HEADER_LEN as c_int;
            // SAFETY: TUNSETVNETHDRSZ reads an int from this address.
            unsafe { ioctl_ptr(file.as_fd(), libc::TUNSETVNETHDRSZ, &mut header) }
                .map_err(failed("have virtio-net headers"))?;
            files.push(Arc::new(file));
        }
        let mut tap = Tap {
            name: name.to_owned(),
            used: queues,
            files,
            offloads: Offloads {
                checksum: true,
                tso4: true,
                tso6: true,
                ufo: true,
            },
        };
        // A host that cannot make UDP fragments, or nothing at all, says so when it is asked.
        for offloads in [
            tap.offloads,
            Offloads {
                ufo: false,
                ..tap.offloads
            },
            Offloads::default(),
        ] {
            tap.offloads = offloads;
            if tap.accept_offloads(offloads).is_ok() {
                break;
            }
        }
        tap.accept_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn file(&self, pair: u16) -> Result<BorrowedFd<'_>, Error> {
        self.files
            .get(usize::from(pair))
            .map(|file| file.as_fd())
            .ok_or_else(|| Error::TapGone {
                name: self.name.clone(),
            })
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error {
        let name = self.name.clone();
        move |source| Error::Tap { name, what, source }
    }

    /// What an error of a read or write means: `Ok` when the tap lives on.
    fn outlived(&self, error: &io::Error) -> Result<(), Error> {
        // The file has lost its interface.
        match error.raw_os_error() {
            Some(libc::EBADFD) => Err(Error::TapGone {
                name: self.name.clone(),
            }),
            _ => Ok(()),
        }
    }
}

impl NetBackend for Tap {
    fn pairs(&self) -> u16 {
        u16::try_from(self.files.len()).unwrap_or(QUEUES_MAX)
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn accept_offloads(&mut self, offloads: Offloads) -> Result<(), Error> {
        let mut bits = 0;
        for (wanted, bit) in [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.ufo, libc::TUN_F_UFO),
        ] {
            // Nothing can be cut into segments whose checksums are not to be filled in.
            if wanted && offloads.checksum {
                bits |= bit;
            }
        }
        // It is a property of the interface, so any of its files will do.
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe { ioctl_value(self.file(0)?, libc::TUNSETOFFLOAD, bits) }
            .map_err(self.failed("set offloads"))
    }

    fn use_pairs(&mut self, pairs: u16) -> Result<(), Error> {
        let pairs = pairs.clamp(1, self.pairs());
        while self.used != pairs {
            let (pair, flag, now) = if self.used < pairs {
                (self.used, libc::IFF_ATTACH_QUEUE, self.used + 1)
            } else {
                (self.used - 1, libc::IFF_DETACH_QUEUE, self.used - 1)
            };
            let mut request = request("", flag);
            // SAFETY: TUNSETQUEUE reads an ifreq from this address.
            unsafe { ioctl_ptr(self.file(pair)?, libc::TUNSETQUEUE, &mut request) }
                .map_err(self.failed("switch a queue on or off"))?;
            self.used = now;
        }
        Ok(())
    }

    fn descriptors(&self) -> Vec<Arc<OwnedFd>> {
        self.files.clone()
    }

    fn receive(
        &mut self,
        pair: u16,
        ram: &GuestRam,
        pieces: &[Piece],
        spill: &mut [u8],
    ) -> Result<Option<usize>, Error> {
        match memory::read(self.file(pair)?, ram, pieces, spill) {
            Ok(len) => Ok(Some(len)),
            // Anything but an end is one frame's misfortune, and the next is looked for when there is one.
            Err(error) => self.outlived(&error).map(|()| None),
        }
    }

    fn send(&mut self, pair: u16, ram: &GuestRam, pieces: &[Piece]) -> Result<Sent, Error> {
        match memory::write(self.file(pair)?, ram, pieces) {
            Ok(_) => Ok(Sent::Whole),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::NoRoom),
            Err(error) => self.outlived(&error).map(|()| Sent::Refused),
        }
    }
}

/// One open file of the tap.
fn attach(name: &str, several: bool) -> Result<OwnedFd, Error> {
    let owned = || name.to_owned();
    let file = rustix::fs::open(
        "/dev/net/tun",
        OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| Error::NoTun {
        name: owned(),
        source: errno.into(),
    })?;
    let plain = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let multi = plain | libc::IFF_MULTI_QUEUE;
    let set = |flags| {
        let mut request = request(name, flags);
        // SAFETY: TUNSETIFF reads and writes an ifreq at this address.
        unsafe { ioctl_ptr(file.as_fd(), libc::TUNSETIFF, &mut request) }
    };
    let first = set(if several { multi } else { plain });
    let error = match first {
        Ok(()) => return Ok(file),
        Err(error) => error,
    };
    Err(match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::TapPermission { name: owned() },
        Some(libc::EBUSY) => Error::TapBusy { name: owned() },
        // Not a tap at all, or one that was made with the other kind of queues. A tap for several serves as one for one.
        Some(libc::EINVAL) => match (several, set(if several { plain } else { multi })) {
            (false, Ok(())) => return Ok(file),
            (true, Ok(())) => Error::OneQueueTap { name: owned() },
            (true, Err(error)) if error.raw_os_error() == Some(libc::EBUSY) => {
                Error::OneQueueTap { name: owned() }
            }
            _ => Error::NotATap { name: owned() },
        },
        // A tap for several queues that has as many files as it can have.
        Some(libc::E2BIG) => Error::TapBusy { name: owned() },
        _ => Error::Tap {
            name: owned(),
            what: "open the tap",
            source: error,
        },
    })
}

/// An ifreq with a name of at most [`NAME_MAX`] bytes, and flags.
fn request(name: &str, flags: c_int) -> libc::ifreq {
    // SAFETY: an ifreq is plain data, for which zeroes mean an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(NAME_MAX)) {
        *to = from.cast_signed() as _;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    request
}

/// An ioctl whose argument is the address of a `T`.
///
/// # Safety
/// The request reads or writes no more than a `T` there.
unsafe fn ioctl_ptr<T>(fd: BorrowedFd<'_>, code: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(argument)) };
    answer(result)
}

/// An ioctl whose argument is a number.
///
/// # Safety
/// The request does not take its argument for an address.
unsafe fn ioctl_value(fd: BorrowedFd<'_>, code: libc::Ioctl, argument: c_uint) -> io::Result<()> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), code, libc::c_ulong::from(argument)) };
    answer(result)
}

fn answer(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::net::namespace;

    #[test]
    fn names_that_no_interface_can_have_are_refused_before_the_host_is_asked() {
        for name in ["", "sixteen-letters-", "a/b", "a b", "tap%d", "..", "a:1"] {
            let error = Tap::open(name, 1).err().unwrap();
            assert!(error.to_string().starts_with("--net tap=: "), "{error}");
        }
        assert!(check_name("fifteen-letters").is_ok());
    }

    #[test]
    fn each_way_a_tap_cannot_be_had_has_its_own_sentence() {
        let name = "backend::net::tap::tests::each_way_a_tap_cannot_be_had_has_its_own_sentence";
        if !namespace::entered(name) {
            return;
        }
        namespace::run("ip tuntap add single mode tap");
        namespace::run("ip tuntap add many mode tap multi_queue");
        namespace::run("ip tuntap add tunnel mode tun");
        let refused = |name, queues| Tap::open(name, queues).err().unwrap();
        assert!(matches!(refused("lo", 1), Error::NotATap { .. }));
        assert!(matches!(refused("lo", 2), Error::NotATap { .. }));
        assert!(matches!(refused("tunnel", 1), Error::NotATap { .. }));
        assert!(matches!(refused("single", 2), Error::OneQueueTap { .. }));
        let one = Tap::open("single", 1).unwrap();
        assert!(matches!(refused("single", 1), Error::TapBusy { .. }));
        assert_eq!((one.pairs(), one.name()), (1, "single"));
        assert!(one.offloads().checksum && one.offloads().tso4 && one.offloads().tso6);
        drop(Tap::open("many", 1).unwrap());
        let mut many = Tap::open("many", 3).unwrap();
        assert_eq!((many.pairs(), many.descriptors().len()), (3, 3));
        for pairs in [1, 3, 2, 2, 0, 9] {
            many.use_pairs(pairs).unwrap();
        }
        let made = Tap::open("made", 1).unwrap();
        namespace::run("ip link show made");
        namespace::run("ip link delete made");
        let ram = crate::mem::allocate(&[(crate::mem::GuestAddress(0), 2 << 20)]).unwrap();
        let mut made = made;
        let error = made.receive(0, &ram, &[], &mut [0; 64]).err().unwrap();
        assert!(matches!(error, Error::TapGone { .. }), "{error}");
    }
}
