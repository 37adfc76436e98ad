//! Disks that are made once.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::super::ensure_disk;
use super::*;

fn ensure(source: &Path, cache: &Path) -> Result<PathBuf> {
    ensure_disk(&Source::open(source.as_os_str())?, cache, &mut patient)
}

fn disks(cache: &Path) -> Vec<String> {
    let names = left_in(cache).into_iter();
    names.filter(|name| !name.ends_with(".lock")).collect()
}

fn layout(text: &str) -> Layout {
    image(&json!({}), &[(Tar::new().file("f", text).finish(), gzip)])
}

#[test]
fn an_image_is_made_once_and_found_again_by_its_digest() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let cache = at("deep/cache");
    layout("one").write(&at("image"));
    let first = ensure(&at("image"), &cache).unwrap();
    check(&first);
    let inode = fs::metadata(&first).unwrap().ino();
    assert_eq!(
        fs::metadata(&first).unwrap().permissions().mode() & 0o777,
        0o444
    );
    // A copy of the image is the same image.
    layout("one").write(&at("copy"));
    assert_eq!(ensure(&at("copy"), &cache).unwrap(), first);
    assert_eq!(ensure(&at("image"), &cache).unwrap(), first);
    assert_eq!(fs::metadata(&first).unwrap().ino(), inode);
    assert_eq!(disks(&cache).len(), 1);
    fs::remove_dir_all(at("image")).unwrap();
    layout("two").write(&at("image"));
    let second = ensure(&at("image"), &cache).unwrap();
    assert_ne!(second, first);
    assert_eq!(
        (cat(&first, "/f"), cat(&second, "/f")),
        ("one".into(), "two".into())
    );
}

#[test]
fn a_disk_goes_when_nobody_has_asked_for_it_in_a_month() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, cache) = (scratch.path().join("image"), scratch.path().join("cache"));
    let make = |text: &str| {
        let _ = fs::remove_dir_all(&source);
        layout(text).write(&source);
        ensure(&source, &cache).unwrap()
    };
    let days_ago = |disk: &Path, days: u64| {
        let lock = fs::File::options()
            .write(true)
            .open(disk.with_extension("lock"));
        let age = std::time::Duration::from_secs(days * 24 * 60 * 60);
        lock.unwrap()
            .set_modified(std::time::SystemTime::now() - age)
            .unwrap();
    };
    let (old, asked_for, recent) = (make("one"), make("two"), make("three"));
    days_ago(&old, 31);
    days_ago(&asked_for, 31);
    days_ago(&recent, 29);
    assert_eq!(make("two"), asked_for);
    assert!(old.exists(), "only those who make a disk remove others");
    let new = make("four");
    assert!(!old.exists());
    assert!(asked_for.exists() && recent.exists() && new.exists());
    assert_eq!(make("one"), old, "it can be made again");
}

#[test]
fn a_tar_is_made_anew_when_it_has_changed() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, cache) = (scratch.path().join("tar"), scratch.path().join("cache"));
    fs::write(&source, Tar::new().file("f", "one").finish()).unwrap();
    let first = ensure(&source, &cache).unwrap();
    assert_eq!(ensure(&source, &cache).unwrap(), first);
    fs::remove_file(&source).unwrap();
    fs::write(
        &source,
        Tar::new().file("f", "three").file("g", "").finish(),
    )
    .unwrap();
    let second = ensure(&source, &cache).unwrap();
    assert_eq!(
        (cat(&first, "/f"), cat(&second, "/f")),
        ("one".into(), "three".into())
    );
}

#[test]
fn several_runs_at_once_make_it_once() {
    let scratch = tempfile::tempdir().unwrap();
    let (path, cache) = (scratch.path().join("image"), scratch.path().join("cache"));
    layout("one").write(&path);
    let built = std::sync::atomic::AtomicUsize::new(0);
    let all: Vec<PathBuf> = std::thread::scope(|scope| {
        let run = || {
            let source = Source::open(path.as_os_str()).unwrap();
            let mut writes = false;
            let mut watch = |progress: &Progress<'_>| {
                writes |= progress.what == "writing the image";
                ControlFlow::Continue(())
            };
            let disk = ensure_disk(&source, &cache, &mut watch).unwrap();
            built.fetch_add(usize::from(writes), std::sync::atomic::Ordering::SeqCst);
            disk
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(built.load(std::sync::atomic::Ordering::SeqCst), 1);
    check(&all[0]);
}

#[test]
fn half_a_disk_is_never_used_and_goes_away() {
    let scratch = tempfile::tempdir().unwrap();
    let (path, cache) = (scratch.path().join("image"), scratch.path().join("cache"));
    layout("one").write(&path);
    let source = Source::open(path.as_os_str()).unwrap();
    let mut stop = |progress: &Progress<'_>| match progress.what {
        "writing the image" => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let stopped = ensure_disk(&source, &cache, &mut stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(disks(&cache).is_empty());
    // And of one that was killed, its file stays until the next.
    let disk = ensure(&path, &cache).unwrap();
    let name = disk.file_name().unwrap().to_str().unwrap();
    fs::write(cache.join(format!(".{name}.1234-abcdef01")), "half").unwrap();
    fs::remove_file(&disk).unwrap();
    assert_eq!(ensure(&path, &cache).unwrap(), disk);
    check(&disk);
    assert_eq!(disks(&cache), [name]);
}

#[test]
fn a_run_that_waits_for_another_can_be_interrupted() {
    let scratch = tempfile::tempdir().unwrap();
    let (path, cache) = (scratch.path().join("image"), scratch.path().join("cache"));
    layout("one").write(&path);
    let disk = ensure(&path, &cache).unwrap();
    fs::remove_file(&disk).unwrap();
    let lock = fs::File::open(disk.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let source = Source::open(path.as_os_str()).unwrap();
    let mut waited = false;
    let mut stop = |progress: &Progress<'_>| {
        waited = progress.what.starts_with("waiting for another run");
        ControlFlow::Break(())
    };
    let stopped = ensure_disk(&source, &cache, &mut stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(waited);
}

#[test]
fn a_disk_is_used_as_it_is_and_a_directory_cannot_be_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let cache = scratch.path().join("cache");
    let disk = disk_of(scratch.path(), &Tar::new().file("f", "x").finish()).unwrap();
    assert_eq!(ensure(&disk, &cache).unwrap(), disk);
    assert!(!cache.exists());
    says(&sentence(ensure(scratch.path(), &cache)), &["a directory"]);
    says(
        &sentence(build(&disk, &scratch.path().join("other"))),
        &["ext4", "needs no root disk"],
    );
}
