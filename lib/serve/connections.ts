/** Connections, and whether a request is under way on them. */
import type { Server } from 'node:http';
import type { Socket } from 'node:net';

/**
 * Node waits for connections that have not sent a request yet when a server closes, and counts one whose request is answered as idle only after that.
 * @returns closes all connections without a request under way, now and as soon as they have none.
 */
export function idleCloser(server: Server): () => void {
  const requests = new Map<Socket, number>();
  let closing = false;
  const change = (socket: Socket, by: number): void => {
    const left = (requests.get(socket) ?? 0) + by;
    if (left === 0 && closing)
      socket.destroySoon(); // when what was written has gone out
    else if (!socket.destroyed) requests.set(socket, left);
  };
  server.on('connection', (socket) => {
    socket.on('close', () => requests.delete(socket));
    change(socket, 0);
  });
  server.on('request', ({ socket }, response) => {
    change(socket, 1);
    response.on('close', () => change(socket, -1));
  });
  return () => {
    closing = true;
    for (const [socket, count] of requests) if (count === 0) socket.destroy();
  };
}
