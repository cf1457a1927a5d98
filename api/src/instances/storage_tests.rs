//! Volumes, snapshots and images of instances over the simulated host: real records, real files.

use std::os::unix::fs::FileExt;

use super::*;
use crate::model::{Snapshot, SnapshotState, Volume, VolumeState};

fn parse<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).unwrap()
}

async fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let waiting = async {
        loop {
            match look() {
                Some(found) => return found,
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("never came to it")
}

async fn settled(service: &Service, id: &str) -> Arc<Volume> {
    let volume = || service.host.records.get::<Volume>(id);
    eventually(|| volume().filter(|volume| volume.state != VolumeState::Creating)).await
}

async fn new_volume(service: &Service, more: serde_json::Value) -> String {
    let id = service.create_volume(parse(more)).await.unwrap().id.clone();
    assert_eq!(settled(service, &id).await.state, VolumeState::Available);
    id
}

async fn new_snapshot(service: &Service, volume: &str) -> Arc<Snapshot> {
    let request = parse(serde_json::json!({"volume_id": volume, "description": "as it was"}));
    let id = service.create_snapshot(request).await.unwrap().id.clone();
    let snapshot = || service.host.records.get::<Snapshot>(&id);
    eventually(|| snapshot().filter(|snapshot| snapshot.state != SnapshotState::Pending)).await
}

async fn stop(service: &Service, id: &str) {
    service.stop(id, StopInstance::default()).await.unwrap();
    reaches(service, id, InstanceState::Stopped).await;
}

fn attach_to(instance: &str) -> AttachVolume {
    parse(serde_json::json!({"instance_id": instance}))
}

fn gone(service: &Service, volume: &str) -> bool {
    service.host.records.get::<Volume>(volume).is_none()
        && !service.host.volumes.path(volume).unwrap().exists()
}

/// Drives of an instance's machine, as the guest has them.
fn drives(simulation: &Simulation, machine: &str) -> Vec<String> {
    simulation.spec(machine).unwrap().vm.drives.into_iter().map(|drive| drive.drive_id).collect()
}

#[tokio::test]
async fn a_volume_goes_from_one_instance_to_another() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let made = serde_json::json!({"size_gib": 2, "tags": {"Name": "data"}, "client_token": "t"});
    let data = new_volume(&service, made.clone()).await;
    assert_eq!(service.create_volume(parse(made)).await.unwrap().id, data, "made once");
    let other = new_volume(&service, serde_json::json!({"size_gib": 1})).await;
    let (a, b) =
        (run_one(&service, serde_json::json!({})).await, run_one(&service, serde_json::json!({})).await);

    let refused = service.attach_volume(&data, &attach_to(&a)).await;
    assert!(matches!(refused, Err(Error::State { kind: crate::model::Kind::Instance, .. })), "{refused:?}");
    stop(&service, &a).await;
    for volume in [&other, &data, &data] {
        let attached = service.attach_volume(volume, &attach_to(&a)).await.unwrap();
        assert_eq!(attached.state, VolumeState::InUse);
    }
    stop(&service, &b).await;
    assert!(matches!(service.attach_volume(&data, &attach_to(&b)).await, Err(Error::InUse { .. })));
    assert!(matches!(service.delete_volume(&data).await, Err(Error::InUse { .. })));
    service.start(&a).await.unwrap();
    reaches(&service, &a, InstanceState::Running).await;
    let serial = |id: &str| id.replace('-', "");
    assert_eq!(drives(&simulation, &format!("{a}-2")), ["root", &serial(&other), &serial(&data)]);
    assert!(serial(&data).len() <= 20, "virtio has room for no more");
    assert!(matches!(service.detach_volume(&data).await, Err(Error::State { .. })), "it runs");

    stop(&service, &a).await;
    for _ in 0..2 {
        assert_eq!(service.detach_volume(&data).await.unwrap().state, VolumeState::Available);
    }
    let root = service.get(&a).unwrap().root_volume.clone();
    assert!(matches!(service.detach_volume(&root).await, Err(Error::NotPermitted(_))));
    service.attach_volume(&data, &attach_to(&b)).await.unwrap();
    let goes = parse(serde_json::json!({"delete_on_termination": true}));
    service.modify_volume(&data, &goes).await.unwrap();

    // One goes with its instance, the other stays.
    for instance in [&a, &b] {
        service.terminate(instance).await.unwrap();
        reaches(&service, instance, InstanceState::Terminated).await;
    }
    eventually(|| gone(&service, &data).then_some(())).await;
    eventually(|| gone(&service, &root).then_some(())).await;
    let stays = service.host.records.get::<Volume>(&other).unwrap();
    assert_eq!((stays.state, &stays.attachment), (VolumeState::Available, &None));
    service.delete_volume(&other).await.unwrap();
    eventually(|| gone(&service, &other).then_some(())).await;
    assert!(service.delete_volume(&other).await.is_err());
}

#[tokio::test]
async fn instances_are_run_with_volumes() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let old = new_volume(&service, serde_json::json!({"size_gib": 1})).await;
    let wanted = serde_json::json!([{"volume_id": old}, {"size_gib": 3}, {"size_gib": 1, "delete_on_termination": false}]);
    let id = run_one(&service, serde_json::json!({"volumes": wanted})).await;
    let volumes = volumes::data_volumes(&service.host.records.read(), &service.get(&id).unwrap());
    assert_eq!(volumes.iter().map(|volume| volume.size >> 30).collect::<Vec<_>>(), [1, 3, 1]);
    assert!(volumes.iter().all(|volume| volume.state == VolumeState::InUse), "{volumes:?}");
    assert_eq!(drives(&simulation, &format!("{id}-1")).len(), 4);
    let again = request(serde_json::json!({"volumes": [{"volume_id": old}]}));
    assert!(matches!(service.run(again).await, Err(Error::InUse { .. })));
    let too_many = request(serde_json::json!({"volumes": vec![serde_json::json!({"size_gib": 1}); 13]}));
    assert!(matches!(service.run(too_many).await, Err(Error::Invalid { .. })));

    service.terminate(&id).await.unwrap();
    reaches(&service, &id, InstanceState::Terminated).await;
    eventually(|| gone(&service, &volumes[1].id).then_some(())).await;
    for kept in [&old, &volumes[2].id] {
        assert_eq!(service.host.records.get::<Volume>(kept).unwrap().state, VolumeState::Available);
    }

    let full =
        run_one(&service, serde_json::json!({"volumes": vec![serde_json::json!({"size_gib": 1}); 12]})).await;
    stop(&service, &full).await;
    let limit = service.attach_volume(&old, &attach_to(&full)).await;
    assert!(matches!(limit, Err(Error::AttachmentLimit { .. })), "{limit:?}");
}

#[tokio::test]
async fn a_snapshot_stays_as_it_was() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let volume = new_volume(&service, serde_json::json!({"size_gib": 1})).await;
    let path = |id: &str| service.host.volumes.path(id).unwrap();
    let write = |id: &str, text: &[u8]| {
        std::fs::File::options().write(true).open(path(id)).unwrap().write_all_at(text, 4096).unwrap();
    };
    let read = |id: &str| {
        let mut text = [0; 5];
        std::fs::File::open(path(id)).unwrap().read_exact_at(&mut text, 4096).unwrap();
        text
    };
    write(&volume, b"first");
    let snapshot = new_snapshot(&service, &volume).await;
    assert_eq!((snapshot.state, snapshot.size), (SnapshotState::Completed, 1 << 30), "{snapshot:?}");
    write(&volume, b"later");
    service.delete_volume(&volume).await.unwrap();

    let smaller = serde_json::json!({"snapshot_id": snapshot.id, "size_gib": 0});
    assert!(service.create_volume(parse(smaller)).await.is_err());
    let restored = new_volume(&service, serde_json::json!({"snapshot_id": snapshot.id, "size_gib": 2})).await;
    assert_eq!(read(&restored), *b"first");
    assert_eq!(std::fs::metadata(path(&restored)).unwrap().len(), 2 << 30);
    let id = run_one(&service, serde_json::json!({"volumes": [{"snapshot_id": snapshot.id}]})).await;

    // Of a running instance, which is paused meanwhile and goes on.
    let with = volumes::data_volumes(&service.host.records.read(), &service.get(&id).unwrap())[0].clone();
    assert_eq!(read(&with.id), *b"first");
    let of_running = new_snapshot(&service, &with.id).await;
    assert_eq!(of_running.state, SnapshotState::Completed, "{of_running:?}");
    eventually(|| {
        let running = matches!(service.machine(&id).unwrap().state(), crate::microvm::State::Running);
        running.then_some(())
    })
    .await;
    service.delete_snapshot(&snapshot.id).await.unwrap();
    assert!(!service.host.volumes.snapshot_path(&snapshot.id).unwrap().exists());
    assert_eq!(read(&restored), *b"first", "what was made of it stays");
    let none = service.create_volume(parse(serde_json::json!({"snapshot_id": snapshot.id}))).await;
    assert!(matches!(none, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_machine_waits_for_the_copy_of_its_disks() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let id = run_one(&service, serde_json::json!({})).await;
    let held = service.hold(&id).await.unwrap();
    let machine = service.machine(&id).unwrap();
    assert!(matches!(machine.state(), crate::microvm::State::Paused));
    service.stop(&id, StopInstance::default()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(service.get(&id).unwrap().state, InstanceState::Stopping, "it waits");
    held.release().await;
    reaches(&service, &id, InstanceState::Stopped).await;

    let held = service.hold(&id).await.unwrap();
    service.start(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(service.get(&id).unwrap().state, InstanceState::Pending, "it waits");
    held.release().await;
    reaches(&service, &id, InstanceState::Running).await;

    // By force nothing is waited for, and the guest does not go on under the copy.
    let held = service.hold(&id).await.unwrap();
    let machine = service.machine(&id).unwrap();
    service.stop(&id, StopInstance::default()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    service.stop(&id, StopInstance { force: true }).await.unwrap();
    reaches(&service, &id, InstanceState::Stopped).await;
    assert!(matches!(machine.ended().await.reason, crate::microvm::Reason::Killed));
    held.release().await;
}

#[tokio::test]
async fn a_machine_that_a_daemon_left_paused_goes_on() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let first = daemon(dir.path(), &simulation).await;
    let id = run_one(&first, serde_json::json!({})).await;
    let volume = first.get(&id).unwrap().root_volume.clone();
    let left = first.hold(&id).await.unwrap();
    first.let_go().await;
    drop((first, left));

    let second = daemon(dir.path(), &simulation).await;
    eventually(|| {
        let machine = second.machine(&id).ok()?;
        matches!(machine.state(), crate::microvm::State::Running).then_some(())
    })
    .await;
    assert_eq!(new_snapshot(&second, &volume).await.state, SnapshotState::Completed);
}

#[tokio::test]
async fn volumes_grow_and_never_shrink() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let volume = new_volume(&service, serde_json::json!({"size_gib": 2})).await;
    let size = |gib: u64| parse::<ModifyVolume>(serde_json::json!({"size_gib": gib}));
    let on_disk = |id: &str| {
        std::fs::metadata(service.host.volumes.path(id).unwrap()).map(|meta| meta.len() >> 30).unwrap()
    };
    assert!(matches!(service.modify_volume(&volume, &size(1)).await, Err(Error::Invalid { .. })));
    assert_eq!(service.modify_volume(&volume, &size(3)).await.unwrap().size >> 30, 3);
    assert_eq!(on_disk(&volume), 3);
    let id = run_one(&service, serde_json::json!({"volumes": [{"volume_id": volume}]})).await;
    assert!(matches!(service.modify_volume(&volume, &size(4)).await, Err(Error::State { .. })));
    stop(&service, &id).await;
    let root = service.get(&id).unwrap().root_volume.clone();
    for grown in [&volume, &root] {
        service.modify_volume(grown, &size(4)).await.unwrap();
        assert_eq!(on_disk(grown), 4);
    }
    service.start(&id).await.unwrap();
    reaches(&service, &id, InstanceState::Running).await;

    // As where the daemon died between the record and the file.
    let larger = |volume: &mut Volume| {
        volume.size = 5 << 30;
        Ok::<_, Error>(())
    };
    service.let_go().await;
    service.host.records.modify(&volume, larger).await.unwrap();
    let path = service.host.volumes.path(&volume).unwrap();
    drop(service);
    let _second = daemon(dir.path(), &simulation).await;
    assert_eq!(std::fs::metadata(path).unwrap().len() >> 30, 5);
}

#[tokio::test]
async fn what_cannot_be_made_says_why_and_leaves_nothing() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let volume = new_volume(&service, serde_json::json!({"size_gib": 1})).await;
    let snapshot = new_snapshot(&service, &volume).await;
    // Somebody removed what it is to be made of.
    service.host.volumes.delete_snapshot(&snapshot.id).unwrap();
    let broken = service.create_volume(parse(serde_json::json!({"snapshot_id": snapshot.id}))).await.unwrap();
    let broken = settled(&service, &broken.id).await;
    assert_eq!(broken.state, VolumeState::Error);
    assert_eq!(broken.state_reason.as_ref().unwrap().code, "Client.InvalidVolume.NotFound");
    assert!(service.attach_volume(&broken.id, &attach_to("i-1")).await.is_err());
    service.delete_volume(&broken.id).await.unwrap();
    eventually(|| gone(&service, &broken.id).then_some(())).await;

    // A disk that is full, as far as we may fill it.
    let full = crate::volume::Volumes::open(dir.path(), u64::MAX / 2).unwrap();
    let Host { records, machines, .. } = service.host.clone();
    let host = Host { volumes: full, records, machines, ..service.host.clone() };
    let cramped = Service { host, ..service.clone() };
    let refused = cramped.create_volume(parse(serde_json::json!({"size_gib": 1}))).await.unwrap_err();
    assert_eq!(failure::of(&refused), (failure::By::Server, "InsufficientStorageCapacity"), "{refused}");
    assert!(refused.to_string().contains("not enough space"), "{refused}");
    assert_eq!(service.host.records.read().volumes.len(), 1);
}

#[tokio::test]
async fn an_image_of_an_instance_has_what_is_on_its_disk() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let image_of = async |id: &str, name: &str| {
        let image = service.create_image(id, parse(serde_json::json!({"name": name}))).await.unwrap();
        let image = || service.images().into_iter().find(|known| known.id == image.id);
        eventually(|| image().filter(|image| image.state != ImageState::Pending)).await
    };
    let id = run_one(&service, serde_json::json!({})).await;
    let disk = service.host.volumes.path(&service.get(&id).unwrap().root_volume).unwrap();
    let write = |text: &[u8]| {
        std::fs::File::options().write(true).open(&disk).unwrap().write_all_at(text, 0).unwrap();
    };
    write(b"running");
    let first = image_of(&id, "first").await;
    assert_eq!(first.state, ImageState::Available, "{first:?}");
    stop(&service, &id).await;
    write(b"stopped");
    let second = image_of(&id, "second").await;
    let content = |image: &Image| {
        let Root::Disk { blob, .. } = &image.manifest.as_ref().unwrap().root else { panic!("{image:?}") };
        std::fs::read(service.host.images.blobs().path(&blob.digest)).unwrap()[..7].to_vec()
    };
    assert_eq!((content(&first), content(&second)), (b"running".to_vec(), b"stopped".to_vec()));
    let taken = service.create_image(&id, parse(serde_json::json!({"name": "second"}))).await;
    assert!(matches!(taken, Err(Error::Exists { .. })));
    let of_it = request(serde_json::json!({"image": "second"}));
    let new = service.run(of_it).await.unwrap()[0].id.clone();
    reaches(&service, &new, InstanceState::Running).await;
    assert!(matches!(service.delete_image("second").await, Err(Error::InUse { .. })));
    service.delete_image("first").await.unwrap();
}

#[tokio::test]
async fn an_import_can_be_given_up_and_says_why_it_failed() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let import = async |more: serde_json::Value| {
        let mut body = serde_json::json!({"name": "x", "kernel": "/nonexistent/kernel"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        service.import_image(parse(body)).await
    };
    let end = async |id: &str| {
        let image = || service.images().into_iter().find(|known| known.id == id);
        eventually(|| image().filter(|image| image.state != ImageState::Pending)).await
    };
    for wrong in [
        serde_json::json!({}),
        serde_json::json!({"root": "/a", "reference": "debian"}),
        serde_json::json!({"root": "relative"}),
        serde_json::json!({"container_file": "/a", "kernel": null}),
        serde_json::json!({"reference": "debian", "username": "me"}),
        serde_json::json!({"reference": "Debian"}),
    ] {
        let refused = import(wrong.clone()).await;
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{wrong}: {refused:?}");
    }
    let failed = import(serde_json::json!({"container_file": "/nonexistent"})).await.unwrap();
    let failed = end(&failed.id).await;
    assert_eq!(failed.state_code.as_deref(), Some("Client.InvalidFile"), "{failed:?}");
    service.delete_image("x").await.unwrap();
    // Nobody listens there.
    let failed = import(serde_json::json!({"reference": "127.0.0.1:1/a:1"})).await.unwrap();
    let failed = end(&failed.id).await;
    assert_eq!(failed.state_code.as_deref(), Some("Server.RegistryUnavailable"), "{failed:?}");
    service.delete_image("x").await.unwrap();

    // A registry that takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let reference = format!("{}/a:1", silent.local_addr().unwrap());
    let pending = import(serde_json::json!({"reference": reference})).await.unwrap();
    let (_connection, _) = tokio::task::spawn_blocking(move || silent.accept().unwrap()).await.unwrap();
    assert_eq!(end_or_pending(&service, &pending.id), Some(ImageState::Pending));
    service.delete_image(&pending.id).await.unwrap();
    assert_eq!(end_or_pending(&service, &pending.id), None);
    // Its name is free at once.
    import(serde_json::json!({"container_file": "/nonexistent"})).await.unwrap();
}

fn end_or_pending(service: &Service, id: &str) -> Option<ImageState> {
    service.images().into_iter().find(|known| known.id == id).map(|image| image.state)
}
