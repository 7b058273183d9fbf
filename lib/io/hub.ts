export interface HubProgress { file: string; loaded: number; total: number }
export interface HubOptions { revision?: string; cacheDir?: string; onProgress?: (p: HubProgress) => void; signal?: AbortSignal }
export async function resolveModel(model: string, _options: HubOptions): Promise<string> { return model; }
