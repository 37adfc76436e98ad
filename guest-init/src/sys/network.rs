//! Network interfaces and the sockets that set them up.

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{check, ioctl, owned};

/// `struct ifreq` with each member of its union that is used here, all as bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    data: [u8; 24],
}

/// `struct sockaddr_in`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct InternetAddress {
    family: u16,
    port: [u8; 2],
    address: [u8; 4],
    zero: [u8; 8],
}

/// `struct sockaddr_ll`.
#[repr(C)]
struct LinkAddress {
    family: u16,
    protocol: [u8; 2],
    index: c_int,
    hardware: u16,
    kind: u8,
    len: u8,
    address: [u8; 8],
}

/// `struct sockaddr_nl`.
#[repr(C)]
struct NetlinkAddress {
    family: u16,
    zero: u16,
    pid: u32,
    groups: u32,
}

/// `struct rtentry`.
#[repr(C)]
struct RouteEntry {
    hash: c_ulong,
    destination: InternetAddress,
    gateway: InternetAddress,
    mask: InternetAddress,
    flags: u16,
    pad: i16,
    pad_2: c_ulong,
    pad_3: *const c_void,
    metric: i16,
    device: *const c_char,
    mtu: c_ulong,
    window: c_ulong,
    irtt: u16,
}

unsafe extern "C" {
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const c_void, len: u32) -> c_int;
    fn sendto(
        fd: c_int,
        bytes: *const c_void,
        len: usize,
        flags: c_int,
        address: *const c_void,
        address_len: u32,
    ) -> isize;
    fn recv(fd: c_int, bytes: *mut c_void, len: usize, flags: c_int) -> isize;
}

const AF_INET: c_int = 2;
const AF_NETLINK: c_int = 16;
const AF_PACKET: c_int = 17;
const SOCK_DGRAM: c_int = 2;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const SOCK_NONBLOCK: c_int = 0o4_000;

/// A socket that reads what the kernel tells udev about devices that come and go.
pub fn device_news() -> io::Result<OwnedFd> {
    const NETLINK_KOBJECT_UEVENT: c_int = 15;
    let kind = SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
    // SAFETY: it touches no memory of this process.
    let news = owned(unsafe { socket(AF_NETLINK, kind, NETLINK_KOBJECT_UEVENT) })?;
    let address = NetlinkAddress {
        family: AF_NETLINK as u16,
        zero: 0,
        pid: 0,
        groups: 1,
    };
    let len = size_of_val(&address) as u32;
    // SAFETY: `address` is a struct sockaddr_nl of that length.
    check(unsafe { bind(news.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(news)
}

/// Receives a packet into `buffer`, and says how long it is.
pub fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buffer` has room for so many bytes.
    let len = unsafe {
        recv(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
        )
    };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// A network interface, by its name.
pub struct Interface {
    socket: OwnedFd,
    name: [u8; 16],
}

const SIOCADDRT: c_ulong = 0x890b;
const SIOCGIFFLAGS: c_ulong = 0x8913;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const SIOCSIFADDR: c_ulong = 0x8916;
const SIOCSIFNETMASK: c_ulong = 0x891c;
const SIOCSIFMTU: c_ulong = 0x8922;
const SIOCGIFHWADDR: c_ulong = 0x8927;
const SIOCGIFINDEX: c_ulong = 0x8933;
const IFF_UP: u16 = 1;
const ETH_P_IP: u16 = 0x0800;

impl Interface {
    /// # Errors
    /// When the kernel has no such interface.
    pub fn open(name: &str) -> io::Result<Interface> {
        let mut bytes = [0; 16];
        // The last byte stays zero.
        if name.len() >= bytes.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        // SAFETY: it touches no memory of this process.
        let socket = owned(unsafe { socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) })?;
        let interface = Interface {
            socket,
            name: bytes,
        };
        interface.index()?;
        Ok(interface)
    }

    /// Makes a request with `data`, and returns what the kernel puts in its place.
    fn request(&self, number: c_ulong, data: &[u8]) -> io::Result<[u8; 24]> {
        let mut request = InterfaceRequest {
            name: self.name,
            data: [0; 24],
        };
        for (to, from) in request.data.iter_mut().zip(data) {
            *to = *from;
        }
        // SAFETY: the numbers above take a struct ifreq, and write nothing outside of it.
        check(unsafe { ioctl(self.socket.as_raw_fd(), number, &mut request) })?;
        Ok(request.data)
    }

    fn index(&self) -> io::Result<c_int> {
        let [a, b, c, d, ..] = self.request(SIOCGIFINDEX, &[])?;
        Ok(c_int::from_ne_bytes([a, b, c, d]))
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> io::Result<[u8; 6]> {
        let [_, _, a, b, c, d, e, f, ..] = self.request(SIOCGIFHWADDR, &[])?;
        Ok([a, b, c, d, e, f])
    }

    /// Switches it on.
    pub fn bring_up(&self) -> io::Result<()> {
        let [a, b, ..] = self.request(SIOCGIFFLAGS, &[])?;
        let flags = u16::from_ne_bytes([a, b]) | IFF_UP;
        self.request(SIOCSIFFLAGS, &flags.to_ne_bytes()).map(drop)
    }

    /// Gives it an address in a network whose addresses share `prefix` bits.
    pub fn set_address(&self, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mask = u32::MAX
            .checked_shl(32 - u32::from(prefix.min(32)))
            .unwrap_or(0);
        let data = |address: Ipv4Addr| {
            let mut data = [0; 8];
            let [a, b, c, d] = address.octets();
            [data[0], data[1]] = (AF_INET as u16).to_ne_bytes();
            [data[4], data[5], data[6], data[7]] = [a, b, c, d];
            data
        };
        self.request(SIOCSIFADDR, &data(address))?;
        let mask = Ipv4Addr::from_bits(mask);
        self.request(SIOCSIFNETMASK, &data(mask)).map(drop)
    }

    /// Sets the most bytes that one packet may have.
    pub fn set_mtu(&self, bytes: u16) -> io::Result<()> {
        self.request(SIOCSIFMTU, &c_int::from(bytes).to_ne_bytes())
            .map(drop)
    }

    /// Sends what goes to no known network to `gateway`; `None`: straight onto this interface's wire to `to` alone.
    pub fn add_route(&self, to: Option<Ipv4Addr>, gateway: Option<Ipv4Addr>) -> io::Result<()> {
        const RTF_UP: u16 = 1;
        const RTF_GATEWAY: u16 = 2;
        const RTF_HOST: u16 = 4;
        let address = |address: Option<Ipv4Addr>| InternetAddress {
            family: AF_INET as u16,
            address: address.unwrap_or(Ipv4Addr::UNSPECIFIED).octets(),
            ..InternetAddress::default()
        };
        let mask = to.map(|_| Ipv4Addr::BROADCAST);
        let flag = |set: bool, flag| if set { flag } else { 0 };
        let route = RouteEntry {
            hash: 0,
            destination: address(to),
            gateway: address(gateway),
            mask: address(mask),
            flags: RTF_UP | flag(gateway.is_some(), RTF_GATEWAY) | flag(to.is_some(), RTF_HOST),
            pad: 0,
            pad_2: 0,
            pad_3: std::ptr::null(),
            metric: 0,
            device: self.name.as_ptr().cast(),
            mtu: 0,
            window: 0,
            irtt: 0,
        };
        // SAFETY: SIOCADDRT reads a struct rtentry; the name in it ends in a zero byte and outlives the call.
        check(unsafe { ioctl(self.socket.as_raw_fd(), SIOCADDRT, &route) }).map(drop)
    }

    /// A socket for whole IPv4 packets on this interface, which works before there is an address.
    pub fn packets(&self) -> io::Result<Packets> {
        let kind = SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
        let protocol = c_int::from(ETH_P_IP.to_be());
        // SAFETY: it touches no memory of this process.
        let socket = owned(unsafe { socket(AF_PACKET, kind, protocol) })?;
        let packets = Packets {
            socket,
            index: self.index()?,
        };
        let address = packets.address();
        let len = size_of_val(&address) as u32;
        // SAFETY: `address` is a struct sockaddr_ll of that length.
        check(unsafe { bind(packets.socket.as_raw_fd(), (&raw const address).cast(), len) })?;
        Ok(packets)
    }
}

/// A packet socket on one interface.
pub struct Packets {
    pub socket: OwnedFd,
    index: c_int,
}

impl Packets {
    /// Everybody on the wire.
    fn address(&self) -> LinkAddress {
        LinkAddress {
            family: AF_PACKET as u16,
            protocol: ETH_P_IP.to_be_bytes(),
            index: self.index,
            hardware: 0,
            kind: 0,
            len: 6,
            address: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        }
    }

    /// Sends an IPv4 packet to everybody on the wire.
    pub fn broadcast(&self, packet: &[u8]) -> io::Result<()> {
        let address = self.address();
        let len = size_of_val(&address) as u32;
        // SAFETY: the packet is so many bytes long, and `address` a struct sockaddr_ll of that length.
        let sent = unsafe {
            sendto(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                len,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
