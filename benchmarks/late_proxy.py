"""A server at $1 that passes on what it receives to a server at $2, and the answers $3 milliseconds late."""

import asyncio
import sys

LISTEN, TARGET, LATE = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) / 1000


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: float) -> None:
    """Pass on what is read, each piece so many seconds late, and then the end of it."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        data = b"first"
        while data:
            moment, data = await pieces.get()
            await asyncio.sleep(moment - loop.time())
            writer.write(data)
        writer.close()

    writing = asyncio.create_task(write())
    data = b"first"
    while data:
        try:
            data = await reader.read(65536)
        except ConnectionError:
            data = b""
        pieces.put_nowait((loop.time() + late, data))
    await writing


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect to the other server, too."""
    answers, questions = await asyncio.open_connection("127.0.0.1", TARGET)
    await asyncio.gather(pump(reader, questions, 0.0), pump(answers, writer, LATE))


async def main() -> None:
    async with await asyncio.start_server(connected, "127.0.0.1", LISTEN) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
