//! A balloon under a driver: pages that go back to the host, the target, statistics, and requests that are too large.

use super::*;
use crate::mem::Bytes;
use crate::virtio::driver::Driver;

const ALL: u64 = F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING;
const TARGET: u64 = 8 << 20;

fn balloon() -> Balloon {
    Balloon::new(TARGET, None).unwrap()
}

/// Fills the guest's pages from `first` with ones.
fn fill(driver: &Driver, first: u32, pages: u32) {
    for page in first..first + pages {
        let at = GuestAddress(u64::from(page) * PAGE);
        driver.ram.write_slice(&[1; PAGE as usize], at).unwrap();
    }
}

/// Which of the guest's pages from `first` are zero.
fn zero(driver: &Driver, first: u32, pages: u32) -> Vec<u32> {
    let is_zero = |page: &u32| {
        let mut bytes = [1; PAGE as usize];
        let at = GuestAddress(u64::from(*page) * PAGE);
        driver.ram.read_slice(&mut bytes, at).unwrap();
        bytes.iter().all(|byte| *byte == 0)
    };
    (first..first + pages).filter(is_zero).collect()
}

/// Page numbers as a request has them.
fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn statistics(list: &[(u16, u64)]) -> Vec<u8> {
    list.iter()
        .flat_map(|(tag, value)| {
            let mut bytes = tag.to_le_bytes().to_vec();
            bytes.extend(value.to_le_bytes());
            bytes
        })
        .collect()
}

#[test]
fn pages_in_the_balloon_go_back_to_the_host_and_others_stay() {
    let mut device = balloon();
    let mut driver = Driver::start(&mut device, ALL);
    fill(&driver, 4000, 100);
    let pages = [4001, 4002, 4003, 4050, 4049, 4051, 4002, u32::MAX, 1 << 20];
    let first = driver.send(INFLATE, &[&numbers(&pages)], &[]);
    let second = driver.send(INFLATE, &[&numbers(&[4099]), &[0xff, 0xff]], &[]);
    device.process(INFLATE).unwrap();
    assert_eq!(
        zero(&driver, 4000, 100),
        [4001, 4002, 4003, 4049, 4050, 4051, 4099]
    );
    for head in [first, second] {
        assert_eq!(driver.used(INFLATE).unwrap().head, head);
    }
    let deflated = driver.send(DEFLATE, &[&numbers(&[4001])], &[]);
    device.process(DEFLATE).unwrap();
    assert_eq!(driver.used(DEFLATE).unwrap().head, deflated);
    fill(&driver, 4001, 1);
    assert!(!zero(&driver, 4000, 100).contains(&4001));
}

#[test]
fn reported_ranges_go_back_on_the_queue_that_follows_from_the_features() {
    for (features, queue) in [(ALL, 3), (ALL & !F_STATS_VQ, 2)] {
        let mut device = balloon();
        let mut driver = Driver::start(&mut device, features);
        fill(&driver, 4000, 100);
        driver.send_raw(queue, &[(4010 * PAGE, 20 * PAGE as u32, 2)]);
        device.process(queue).unwrap();
        assert_eq!(driver.used(queue).unwrap().len, 0);
        assert_eq!(zero(&driver, 4000, 100), (4010..4030).collect::<Vec<_>>());
    }
    let mut device = balloon();
    let mut driver = Driver::start(&mut device, F_STATS_VQ);
    driver.send(3, &[], &[4096]);
    device.process(3).unwrap();
    assert_eq!(driver.used(3), None, "nobody agreed on reports");
}

#[test]
fn a_request_of_any_size_takes_a_bounded_number_of_pages() {
    let mut device = balloon();
    let mut driver = Driver::start(&mut device, ALL);
    // Sixteen mebibytes of the same page number, and then as much again.
    fill(&driver, 100, 1);
    for _ in 0..2 {
        driver.send_raw(INFLATE, &[(0x10_0000, 16 << 20, 0)]);
    }
    device.process(INFLATE).unwrap();
    assert!(driver.used(INFLATE).is_some());
    assert_eq!(
        driver.used(INFLATE),
        None,
        "the event loop has others to serve"
    );
    device.process(INFLATE).unwrap();
    assert!(driver.used(INFLATE).is_some());
}

#[test]
fn the_target_is_in_the_configuration_and_a_change_is_told() {
    let mut device = balloon();
    let handle = device.handle();
    let driver = Driver::start(&mut device, ALL);
    let word = |device: &Balloon, offset| {
        let mut word = [0; 4];
        device.read_config(offset, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!((word(&device, 0), word(&device, 4)), (2048, 0));
    assert_eq!((word(&device, 8), word(&device, u64::MAX)), (0, 0));
    handle.set_target(1 << 20);
    device.ready(0, Interest::READ).unwrap();
    assert_eq!((word(&device, 0), driver.line.edges()), (256, 1));
    device.write_config(4, &200_u32.to_le_bytes());
    device.write_config(4, &[1]);
    device.write_config(0, &7_u32.to_le_bytes());
    device.write_config(u64::MAX, &7_u32.to_le_bytes());
    assert_eq!((word(&device, 0), word(&device, 4)), (256, 200));
    handle.set_target(u64::MAX);
    assert_eq!(word(&device, 0), u32::MAX);
    assert_eq!(handle.report().actual_mib, 0);
    device.reset();
    assert_eq!(
        word(&device, 4),
        200,
        "what a guest that powers off had given up"
    );
    Driver::start(&mut device, ALL);
    assert_eq!(word(&device, 4), 0);
}

#[test]
fn statistics_are_read_and_asked_for_anew() {
    let mut device = Balloon::new(TARGET, Some(Duration::from_secs(3600))).unwrap();
    let handle = device.handle();
    let mut driver = Driver::start(&mut device, ALL);
    assert_eq!(device.sources().len(), 2);
    device.ready(1, Interest::READ).unwrap();
    assert_eq!(handle.report().stats, None);
    let sent = statistics(&[(4, 1000), (5, 2000), (77, 3), (0, 5)]);
    let head = driver.send(STATISTICS, &[&sent, b"odd"], &[]);
    device.process(STATISTICS).unwrap();
    assert_eq!(driver.used(STATISTICS), None, "it is kept");
    let read = handle.report().stats.unwrap();
    assert_eq!(
        (read.free_memory, read.total_memory),
        (Some(1000), Some(2000))
    );
    assert_eq!((read.swap_in, read.swap_out), (Some(5), None));
    device.ready(1, Interest::READ).unwrap();
    assert_eq!(driver.used(STATISTICS).unwrap().head, head);
    device.ready(1, Interest::READ).unwrap();
    assert_eq!(driver.used(STATISTICS), None, "there is none to give back");
    // A driver that gives two gets the first one back.
    let first = driver.send(STATISTICS, &[&statistics(&[(4, 7)])], &[]);
    driver.send(STATISTICS, &[&statistics(&[(4, 8)])], &[]);
    device.process(STATISTICS).unwrap();
    assert_eq!(driver.used(STATISTICS).unwrap().head, first);
    assert_eq!(handle.report().stats.unwrap().free_memory, Some(8));
}

#[test]
fn a_saved_balloon_goes_on_with_its_target_size_and_kept_buffer() {
    let mut device = balloon();
    let mut driver = Driver::start(&mut device, ALL);
    let head = driver.send(STATISTICS, &[&statistics(&[(4, 7)])], &[]);
    device.process(STATISTICS).unwrap();
    device.write_config(4, &200_u32.to_le_bytes());
    let saved = device.save();
    let mut restored = Balloon::new(0, None).unwrap();
    restored.restore(&saved).unwrap();
    assert_eq!(restored.config(), device.config());
    assert_eq!(restored.kept, Some(head));
}

#[test]
fn broken_chains_are_reported() {
    for queue in 0..4 {
        let mut device = balloon();
        let mut driver = Driver::start(&mut device, ALL);
        driver.send_raw(queue, &[(u64::MAX - 8, 64, 2)]);
        assert_eq!(device.process(queue), Err(Malformed::Address));
    }
}
