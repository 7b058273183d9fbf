/** Tracks connections and their active requests. */
import type { Server } from 'node:http';
import type { Socket } from 'node:net';

/**
 * When a server closes, Node waits for connections that have not sent a request yet, and considers a connection idle only some time after
 * its response.
 * @returns a function that closes all connections without an active request, both now and as soon as they become idle.
 */
export function idleCloser(server: Server): () => void {
  const requests = new Map<Socket, number>();
  let closing = false;
  const change = (socket: Socket, by: number): void => {
    const left = (requests.get(socket) ?? 0) + by;
    if (left === 0 && closing)
      socket.destroySoon(); // after the pending data is written
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
