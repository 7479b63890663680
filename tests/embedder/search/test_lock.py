import threading

from embedder.search.lock import ReadWriteLock

LONG_S = 30


def test_readers_run_side_by_side() -> None:
    lock = ReadWriteLock()
    both_inside = threading.Barrier(2)

    def read() -> None:
        with lock.read():
            both_inside.wait(LONG_S)  # breaks, and fails the test, if they take turns

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both_inside.broken


def test_a_writer_is_alone() -> None:
    lock = ReadWriteLock()
    counter = [0]
    faults: list[str] = []

    def write() -> None:
        for _ in range(300):
            with lock.write():
                before = counter[0]
                threading.Event().wait(1e-5)  # lets others run, if the lock does
                counter[0] = before + 1

    def read() -> None:
        for _ in range(300):
            with lock.read():
                before = counter[0]
                threading.Event().wait(1e-5)
                if counter[0] != before:
                    faults.append("changed while reading")

    threads = [threading.Thread(target=target) for target in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter == [600]
    assert faults == []


def test_new_readers_wait_for_a_waiting_writer() -> None:
    lock = ReadWriteLock()
    order: list[str] = []
    reading, release = threading.Event(), threading.Event()

    def first_reader() -> None:
        with lock.read():
            reading.set()
            release.wait(LONG_S)

    def writer() -> None:
        with lock.write():
            order.append("writer")

    def second_reader() -> None:
        with lock.read():
            order.append("reader")

    threads = [threading.Thread(target=first_reader)]
    threads[0].start()
    assert reading.wait(LONG_S)
    threads.append(threading.Thread(target=writer))
    threads[1].start()
    while not lock._writers_waiting:
        pass
    threads.append(threading.Thread(target=second_reader))
    threads[2].start()
    release.set()
    for thread in threads:
        thread.join()
    assert order == ["writer", "reader"]


def test_a_waiting_reader_comes_before_the_next_writer() -> None:
    lock = ReadWriteLock()
    order: list[str] = []
    waiting = threading.Event()

    def read() -> None:
        waiting.set()
        with lock.read():
            order.append("reader")

    def write() -> None:
        with lock.write():
            order.append("writer")

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    with lock.write():
        threads[0].start()
        assert waiting.wait(LONG_S)
        while not lock._readers_waiting:
            threading.Event().wait(1e-3)
        threads[1].start()
        while not lock._writers_waiting:
            threading.Event().wait(1e-3)
    for thread in threads:
        thread.join(LONG_S)
    assert order == ["reader", "writer"]
